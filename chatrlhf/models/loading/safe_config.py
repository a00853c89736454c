"""Configurations of models that others made: what they ask to be run is refused, unless the user trusts the model."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from chatrlhf.compat import kernels_of
from chatrlhf.errors import ConfigError


def auto_config(place: Any, **kwargs: Any) -> Any:
    """As `AutoConfig.from_pretrained`, of a model's own code only what ``trust_remote_code`` allows.

    Raises:
        ConfigError: it names kernels on the hub, which are code, too. Others as transformers raises them.
    """
    kwargs = {"trust_remote_code": False} | kwargs  # None would ask on the terminal
    settings = AutoConfig.from_pretrained(place, **kwargs)
    named = [kernel for kernel in kernels_of(settings) if "/" in kernel]  # "sdpa" has none, "owner/name" is on the hub
    if named and not kwargs["trust_remote_code"]:
        raise ConfigError(
            f"{place}: its config.json asks for kernels of the hub ({named[0]}), which are code that would run here; "
            "remove that from the file, or set trust_remote_code to True"
        )
    return settings
