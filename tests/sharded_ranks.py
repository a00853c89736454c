"""As `ranks.py`, with what is trained sharded by DeepSpeed or FSDP2: `torchrun tests/sharded_ranks.py FILE`."""

from __future__ import annotations

import os
import sys
from typing import Any

import accelerate.state
import ranks
import torch
from accelerate.utils import DistributedType
from torch import nn

from chatrlhf.rl.sharded_backend import EngineBackend, shard_actor_critic
from chatrlhf.rl.update import Updater
from chatrlhf.runtime import collectives
from chatrlhf.sharding.accelerate_env import DeepSpeed, Fsdp2, environment_for, shards_params
from chatrlhf.sharding.engine import Engine

CPU = torch.device("cpu")
# Plain descent: a gradient that is too large by a factor shows, as it does not with Adam.
DESCENT = {"type": "SGD", "params": {"lr": 0.05, "momentum": 0.9}}
COMMON = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "optimizer": DESCENT}
SETTINGS = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2 with offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
# Of `ranks.CASES`. An engine has one norm of its gradient, so what is one engine's is compared without clipping.
UNCLIPPED = ("shared trunk", "frozen trunk, one row a step")
CASES = [
    ("ZeRO-1", "rloo"),
    ("ZeRO-2 with offload", "separate critic"),
    ("ZeRO-2 with offload", "one row a step"),
    ("ZeRO-2 with offload", "frozen trunk, one row a step"),
    ("ZeRO-3", "separate critic"),
    ("ZeRO-3", "one row a step"),
    ("ZeRO-3", "frozen trunk, one row a step"),
    ("ZeRO-3", "shared trunk"),
    ("ZeRO-3", "grpo"),
    ("ZeRO-3", "bfloat16"),
    ("FSDP2", "separate critic"),
    ("FSDP2", "one row a step"),
    ("FSDP2", "frozen trunk, one row a step"),
    ("FSDP2", "shared trunk"),
    ("FSDP2", "bfloat16"),
]
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def clip_of(case: str) -> float | None:
    """The norm that gradients of a case are clipped to."""
    return None if case in UNCLIPPED else 1.0


def have_fsdp_on_cpus() -> None:
    """accelerate has FSDP on accelerators only; torch has it on CPUs, too."""
    init = accelerate.state.AcceleratorState.__init__

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    accelerate.state.AcceleratorState.__init__ = with_fsdp


class Dealer:
    """Makes the updater of `ranks.ppo_steps` one over engines."""

    def __init__(self, name: str, clip: float | None) -> None:
        self.clip = clip
        self.sharding = Fsdp2()
        if name in SETTINGS:
            settings = COMMON | {"zero_optimization": SETTINGS[name], "gradient_clipping": clip or 0.0}
            self.sharding = DeepSpeed(settings, name)

    def __call__(self, made: Any, reference: Any, groups: list[dict[str, Any]], dtype: torch.dtype, *rest: Any) -> Any:
        def engine(modules: list[nn.Module], share: list[dict[str, Any]]) -> Engine:
            return self.zero(modules, share, dtype) if self.sharding != Fsdp2() else self.fsdp(modules, share, dtype)

        weights = shards_params(self.sharding)
        dealt = shard_actor_critic(
            made, [reference.model], lambda _: None, engine, groups, weights, dtype, CPU, keep_frozen=True
        )
        constant = [torch.optim.lr_scheduler.ConstantLR(each.optimizer, factor=1.0) for each in dealt.engines]
        return Updater(dealt.trained, *rest, EngineBackend(dealt, constant, CPU))

    def zero(self, modules: list[nn.Module], share: list[dict[str, Any]], dtype: torch.dtype) -> Engine:
        from deepspeed import DeepSpeedEngine

        from chatrlhf.sharding.deepspeed import ZeroEngine

        settings = self.sharding.settings | {"bf16": {"enabled": dtype == torch.bfloat16}}
        made = ZeroEngine(modules, share, settings, (0.9, 0.95), 0.0)
        assert type(made.model) is DeepSpeedEngine
        assert made.model.zero_optimization_stage() == self.sharding.stage
        assert made.model.dp_world_size == collectives.world_size() == int(os.environ["WORLD_SIZE"]) == 2
        return made

    def fsdp(self, modules: list[nn.Module], share: list[dict[str, Any]], dtype: torch.dtype) -> Engine:
        from torch.distributed.fsdp import FSDPModule

        from chatrlhf.sharding.fsdp import FsdpEngine

        made = FsdpEngine(modules, share, dtype, (0.9, 0.95), 0.0, self.clip)
        made.optimizer = torch.optim.SGD(made.optimizer.param_groups, momentum=0.9)
        blocks = [each for each in made.model.modules() if isinstance(each, FSDPModule)]
        assert len(blocks) > 2  # each of the model's two, and what is around them
        assert made.accelerator.num_processes == collectives.world_size() == 2
        assert all(each.device_mesh.size() == 2 for each in made.model.parameters())
        return made


def main() -> None:
    torch.set_num_threads(1)
    os.environ.update(FSDP2)
    have_fsdp_on_cpus()
    collectives.start()
    results = {}
    for name, case in CASES:
        clip = clip_of(case)
        dealer = Dealer(name, clip)
        with environment_for(dealer.sharding):
            results[name, case] = ranks.ppo_steps(*ranks.CASES[case], deal=dealer, clip=clip)
    if collectives.is_main():
        torch.save(results, sys.argv[1])
    collectives.end()


if __name__ == "__main__":
    main()
