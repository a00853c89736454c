"""Public preference datasets, one file each: where they lie and how a row becomes a pair."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from chatrlhf.data.records import Preference
from chatrlhf.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A dataset on the hub whose files are ``<subset>/<split><suffix>``, one JSON object a line."""

    hub_name: str
    subsets: tuple[str, ...]  # those that `convert` understands
    splits: tuple[str, ...]
    suffix: str
    template: str  # the template that fits the prompts
    pairs_per_prompt: int
    # (row, its place for messages) to a pair, or to the reason why the row is left out; raises DataError.
    convert: Callable[[Row, str], Preference | str]


def text_field(row: Row, field: str, place: str) -> str:
    """A field that must hold text. Raises DataError with place and field."""
    value = row.get(field)
    if not isinstance(value, str):
        have = ", ".join(map(repr, row)) or "no fields"
        got = type(value).__name__ if field in row else "nothing"
        raise DataError(
            f"{place}, field {field!r}: expected text, got {got} (the row has {have}); "
            "check that this is the dataset you asked for"
        )
    return value
