"""What accelerate reads from the environment, kept to the stage that asked for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from chatrlhf.compat import reset_accelerate
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.collectives import init_single_process_group

LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # set by every `accelerate launch`
DEEPSPEED, FSDP = "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"
LOCAL_RANK = "LOCAL_RANK"  # DeepSpeed asks for it, whoever has launched it
PREFIXES = ("ACCELERATE_", "FSDP_", LOCAL_RANK)
OF_DEEPSPEED = (DEEPSPEED, "ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_")


@dataclass(frozen=True)
class DeepSpeed:
    """Sharded by DeepSpeed."""

    settings: dict[str, Any]  # its JSON, where "auto" stands for what the YAML says
    source: str  # where it comes from, for messages

    @property
    def stage(self) -> int:
        """1 shards optimizer states, 2 gradients too, 3 weights too."""
        return int(self.settings["zero_optimization"].get("stage", 0))

    def __str__(self) -> str:
        return f"DeepSpeed ZeRO-{self.stage}"


@dataclass(frozen=True)
class Fsdp2:
    """Sharded by FSDP2, as accelerate was configured."""

    def __str__(self) -> str:
        return "FSDP2"


Sharding = DeepSpeed | Fsdp2 | None  # None: every process has all of it


def shards_params(sharding: Sharding) -> bool:
    """Whether no process keeps all weights."""
    return isinstance(sharding, Fsdp2) or (sharding is not None and sharding.stage == 3)


def is_on(variable: str) -> bool:
    """Whether a launcher has set a switch."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def launched_by_accelerate() -> bool:
    """Whether this process was started by `accelerate launch`."""
    return LAUNCHED in os.environ


def require_deepspeed(key: str) -> None:
    """Refuse where DeepSpeed is not installed."""
    import importlib.util

    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f'{key}: True needs a package that is not installed; pip install "chatrlhf[deepspeed]", or set it to False'
        )


@contextmanager
def environment_for(sharding: Sharding) -> Iterator[None]:
    """Inside, accelerate and transformers find what ``sharding`` is, and afterwards what was there before.

    They take a launcher's variables as meant for every model, and leave variables of their own behind.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
    if isinstance(sharding, DeepSpeed):
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        init_single_process_group()
        os.environ.setdefault(LOCAL_RANK, "0")
    for name in before:
        if name.startswith(OF_DEEPSPEED):  # what it says is handed over as settings
            del os.environ[name]
    if not isinstance(sharding, Fsdp2):
        os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if sharding is not None:
            _forget()
        for name in [name for name in os.environ if name.startswith(PREFIXES)]:
            del os.environ[name]
        os.environ.update(before)


def fresh_state() -> None:
    """Have accelerate know this launch's processes, and nothing of models that it has met."""
    from accelerate import PartialState

    reset_accelerate()
    PartialState(cpu=not torch.cuda.is_available())


def _forget() -> None:
    """Have the libraries forget that a model was sharded."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    fresh_state()
