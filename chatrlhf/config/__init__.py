"""YAML to one typed, validated `Config`. It is parsed once and never enters the maths."""

from chatrlhf.config.load import load_config
from chatrlhf.config.rl import GenKwargs, TrainerConfig
from chatrlhf.config.schema import (
    ActorConfig,
    Config,
    CriticConfig,
    RewardConfig,
    TinyConfig,
)

__all__ = [
    "ActorConfig",
    "Config",
    "CriticConfig",
    "GenKwargs",
    "RewardConfig",
    "TinyConfig",
    "TrainerConfig",
    "load_config",
]
