"""Dimensions of published models, in the package's files: a plan needs no network, and no leave for a gated model."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError
from chatrlhf.runtime.bundled_files import artifacts_root

FOLDER = Path("artifacts/config/shapes")


@cache
def _by_name() -> dict[str, Path]:
    """Hub ids, and the files' own names, in small letters."""
    found = {}
    for path in sorted((artifacts_root() / FOLDER).glob("*.json")):
        ids = json.loads(path.read_text(encoding="utf-8"))["ids"]
        found |= {name.lower(): path for name in (path.stem, *ids)}
    return found


def has_shape(name: str) -> bool:
    """Whether a model's dimensions are in the package."""
    return name.lower() in _by_name()


def shape_names() -> list[str]:
    """The names of all, as `--compare` takes them."""
    return sorted({path.stem for path in _by_name().values()})


def shape_settings(name: str) -> Any:
    """A transformers configuration with the dimensions of a published model.

    Raises:
        ConfigError: they are not in the package.
    """
    path = _by_name().get(name.lower())
    if path is None:
        raise ConfigError(f"{name!r}: its dimensions are not known; there are those of {', '.join(shape_names())}")
    from transformers import AutoConfig

    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["ids"]
    return AutoConfig.for_model(fields.pop("model_type"), **fields)
