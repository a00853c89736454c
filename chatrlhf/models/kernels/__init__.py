"""Faster forms of what transformers computes, each equal to it, behind one switch.

`trainer_config.model_kernels: off`, or CHATRLHF_MODEL_KERNELS=off in the environment, leaves every model of the RL
stage as transformers made it: the plain path, which is the reference that the kernels are tested against.
"""

from __future__ import annotations

import os

from chatrlhf.errors import ConfigError

VARIABLE = "CHATRLHF_MODEL_KERNELS"
AUTO, OFF = "auto", "off"


def use_kernels(setting: str) -> bool:
    """Whether models get this package's kernels.

    Args:
        setting: ``auto`` or ``off``; the environment's value wins.

    Raises:
        ConfigError: the environment names neither.
    """
    asked = os.environ.get(VARIABLE) or setting
    if asked not in (AUTO, OFF):
        raise ConfigError(f"{VARIABLE}: expected 'auto' or 'off', got {asked!r}")
    return asked == AUTO
