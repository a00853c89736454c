"""One JSON object with the place it came from; every message about a row starts with that place."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from chatrlhf.errors import DataError

FLOAT32_MAX = 3.4028234663852886e38
# As JSON writes them, with a sign or a digit less; not Python's 1_000, nan or digits of other scripts.
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)


class LoneSurrogate(DataError):
    """A text that cannot be written as UTF-8."""


@dataclass(frozen=True)
class Row:
    """Fields that are read with a check of their kind; all readers raise DataError with place and field."""

    values: dict[str, Any]
    place: str  # "file.json, row 3"
    of_text: bool = False  # its values are texts, as a CSV file has them, also where a number is meant

    def __contains__(self, field: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(field) is not None

    def text(self, field: str) -> str:
        """Text that must be there."""
        value = self._given(field, str, "text")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of an emoji, where a program cut the text in the middle
            raise LoneSurrogate(
                f"{self.place}, field {field!r}: character {error.start + 1} is half of a surrogate pair, which is no "
                "text; correct or remove it"
            ) from None
        return value

    def optional_text(self, field: str) -> str | None:
        """Text, or None where the field is missing or null."""
        return self.text(field) if field in self else None

    def texts(self, field: str) -> list[str]:
        """A list of texts; none where the field is missing or null."""
        if field not in self:
            return []
        values = self._given(field, list, "a list")
        items = Row(
            {str(number): value for number, value in enumerate(values, start=1)}, f"{self.place}, field {field!r}"
        )
        return [items.text(number) for number in items.values]

    def whole_number(self, field: str) -> int:
        """An integer that must be there."""
        value = self.with_numbers(field)._given(field, int, "a whole number")
        if isinstance(value, bool):
            raise self.wrong(field, f"expected a whole number, got {describe(value)}")
        return value

    def flag(self, field: str) -> bool:
        """Whether a field is true; it is not where it is missing or null."""
        value = self.values.get(field)
        if not (self.of_text and isinstance(value, str)):
            return bool(value)
        if value.lower() not in ("true", "false"):
            raise self.wrong(field, f"expected true or false, got {describe(value)}")
        return value.lower() == "true"

    def score(self, field: str) -> float | None:
        """A finite number, or None where it is null: losses are computed in float32."""
        value = self.with_numbers(field).values[field]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float, Decimal)):
            raise self.wrong(field, f"expected a number, got {describe(value)}")
        # Compared as Python numbers: an integer of any length is allowed in JSON.
        if not -FLOAT32_MAX <= value <= FLOAT32_MAX:
            shown = str(value) if len(str(value)) <= 40 else f"{str(value)[:37]}..."
            raise self.wrong(field, f"{shown} is not a finite number; correct or remove the row")
        return float(value)

    def rows(self, field: str) -> list[Row]:
        """The objects of a list, each with its place; none where the field is missing or null."""
        if field not in self:
            return []
        return [
            replace(Row.of(value, f"{self.place}, field {field!r}, number {number}"), of_text=self.of_text)
            for number, value in enumerate(self._given(field, list, "a list"), start=1)
        ]

    def row(self, field: str) -> Row:
        """An object inside this one; empty where the field is missing or null."""
        row = Row.of(self.values.get(field) or {}, f"{self.place}, field {field!r}")
        return replace(row, of_text=self.of_text)

    def with_numbers(self, *fields: str) -> Row:
        """The row with the numbers that fields hold as text, where all its values are texts; blanks are null.

        What is no number stays text, so that the reader of the field says what is wrong with it.
        """
        if not self.of_text:
            return self
        texts = {field: self.values[field] for field in fields if isinstance(self.values.get(field), str)}
        return replace(self, values=self.values | {field: _number(text) for field, text in texts.items()})

    def wrong(self, field: str, reason: str) -> DataError:
        """What to raise about a field."""
        return DataError(f"{self.place}, field {field!r}: {reason}")

    @staticmethod
    def of(value: Any, place: str) -> Row:
        """A parsed JSON value as a row. Raises DataError where it is no object."""
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected an object with fields, got {describe(value)}")
        return Row(value, place)

    def _given(self, field: str, kind: type, name: str) -> Any:
        if field not in self.values:
            raise DataError(f"{self.place}: field {field!r} is missing (found {names_of(self.values)}); add it")
        value = self.values[field]
        if not isinstance(value, kind):
            hint = "; a CSV cell holds text alone, so write such rows as JSONL" if self.of_text and kind is list else ""
            raise self.wrong(field, f"expected {name}, got {describe(value)}{hint}")
        return value


def _number(text: str) -> int | float | str | None:
    text = text.strip()
    if WHOLE.fullmatch(text):
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text or None


def names_of(values: dict[str, Any]) -> str:
    """The fields of an object in short, for messages."""
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in list(values)[:20]]
    return ", ".join([*shown, "..."] if len(values) > len(shown) else shown) or "no fields"


def describe(value: Any) -> str:
    """A JSON value in short, for messages."""
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"


def digest(text: str) -> int:
    """64 bits of a text: two of a million texts share theirs with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
