"""How weights, gradients and optimizer states are sharded over devices, and what each of them holds then.

ZeRO (Rajbhandari et al. 2020): stage 1 shards optimizer states, 2 gradients, too, 3 weights, too, as FSDP2 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatrlhf.config.schema import Config
from chatrlhf.sharding.deepspeed_config import read_deepspeed_config

ADAM_STATES = 2
# DeepSpeed's own, where its file says nothing or "auto".
REDUCE_BUCKET, LIVE_PARAMETERS = 500_000_000, 1_000_000_000


@dataclass(frozen=True)
class Sharding:
    """Who shards what over how many devices."""

    engine: str = "none"  # none (one device), ddp, deepspeed, fsdp
    ranks: int = 1
    stage: int = 0  # of ZeRO; FSDP's is 3
    offload_optimizer: bool = False  # to the CPU's memory
    offload_weights: bool = False
    low: bool = False  # weights in 16 bit; float32 ones are among the optimizer's states
    bucket: int = 0  # gradients on their way, in elements
    live: int = LIVE_PARAMETERS  # weights that stage 3 has whole at once, at most

    @property
    def line(self) -> str:
        """In words."""
        if self.engine == "none":
            return "one device holds all"
        if self.engine == "ddp":
            return f"{self.ranks} devices, each holds all (data parallel)"
        name = "FSDP2" if self.engine == "fsdp" else f"DeepSpeed ZeRO-{self.stage}"
        offload = [
            what for what, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_weights)) if on
        ]
        return f"{self.ranks} devices, {name}" + (f", {' and '.join(offload)} in the CPU's memory" if offload else "")

    def weights(self, size: int, numel: int) -> tuple[int, int]:
        """(on the device, on the host) of ``numel`` weights that are ``size`` bytes."""
        if self.stage < 3:
            return size, 0
        own = -(-size // self.ranks)
        whole = min(size, self.live * (size // max(numel, 1)))
        return (whole, own) if self.offload_weights else (min(size, own + whole), 0)

    def gradient(self, size: int) -> int:
        """Bytes on the device of gradients that are ``size`` bytes, once they are added up."""
        if self.stage < 2:
            return size
        return 0 if self.offload_optimizer else -(-size // self.ranks)

    def in_transit(self, size: int, trained: int) -> int:
        """Bytes of gradients on their way to others."""
        if self.engine == "ddp":
            return size
        return min(self.bucket, trained) * (size // max(trained, 1)) if self.engine == "deepspeed" else 0

    def optimizer(self, trained: int, size: int) -> tuple[int, int]:
        """(on the device, on the host) of Adam's states for ``trained`` weights of ``size`` bytes.

        DeepSpeed improves float32 copies of the weights and hands them float32 gradients, whatever the weights are.
        """
        each = ADAM_STATES * 4 + 8 if self.engine == "deepspeed" else ADAM_STATES * (size // max(trained, 1))
        own = -(-each * trained // (self.ranks if self.stage >= 1 else 1))
        return (0, own) if self.offload_optimizer else (own, 0)


def sharding_of(config: Config, section_name: str, ranks: int) -> Sharding:
    """As a stage's section asks for it.

    Raises:
        ConfigError: DeepSpeed's file cannot be read.
    """
    if getattr(config, section_name).deepspeed_enable:
        return from_deepspeed(read_deepspeed_config(config, section_name)[0], ranks)
    # What accelerate shards is said where it is launched; without that, it is data parallelism.
    return Sharding("ddp", ranks) if ranks > 1 else Sharding()


def from_deepspeed(settings: dict[str, Any], ranks: int) -> Sharding:
    """As a DeepSpeed configuration says."""
    zero = settings["zero_optimization"]
    offloads = [zero.get(name, {}).get("device", "none") != "none" for name in ("offload_optimizer", "offload_param")]
    low = any(settings.get(name, {}).get("enabled", False) is not False for name in ("bf16", "fp16"))
    return Sharding(
        "deepspeed",
        ranks,
        int(zero.get("stage", 0)),
        *offloads,
        low,
        _number(zero.get("reduce_bucket_size"), REDUCE_BUCKET),
        _number(zero.get("stage3_max_live_parameters"), LIVE_PARAMETERS),
    )


def _number(value: Any, default: int) -> int:
    return int(value) if isinstance(value, (int, float)) else default
