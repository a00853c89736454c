"""Configurations of models that others made: what they ask to be run is refused, unless the user trusts the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from chatrlhf.compat import kernels_of
from chatrlhf.errors import ConfigError

TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
MOST_BYTES = 2**28  # of one that is read whole; the largest vocabularies take a tenth of it


def auto_config(place: Any, **kwargs: Any) -> Any:
    """As `AutoConfig.from_pretrained`, of a model's own code only what ``trust_remote_code`` allows.

    Raises:
        ConfigError: it names kernels on the hub, which are code, too; or a file is too large. Others as transformers
            raises them.
    """
    refuse_large_texts(place)
    kwargs = {"trust_remote_code": False} | kwargs  # None would ask on the terminal
    settings = AutoConfig.from_pretrained(place, **kwargs)
    named = [kernel for kernel in kernels_of(settings) if "/" in kernel]  # "sdpa" has none, "owner/name" is on the hub
    if named and not kwargs["trust_remote_code"]:
        raise ConfigError(
            f"{place}: its config.json asks for kernels of the hub ({named[0]}), which are code that would run here; "
            "remove that from the file, or set trust_remote_code to True"
        )
    return settings


def refuse_large_texts(place: Any) -> None:
    """Raise a ConfigError where a folder's configuration, tokenizer or template is no such file by its size."""
    folder = Path(place)
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.suffix in TEXTS and path.is_file() and (size := path.stat().st_size) > MOST_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes, expected at most {MOST_BYTES:,}; copy or download it again")
