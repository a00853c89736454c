"""What lies on disk: ChatLLaMA's three record shapes and preference pairs, in JSON or JSONL.

    actor    {"user_input": str, "completion": str}
    reward   {"user_input": str, "completion": str, "score": float}     or
             {"user_input": str, "chosen": str, "rejected": str}
    prompts  {"user_input": str}

These names become field terms here and nowhere else. Files are only ever read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from chatrlhf.errors import DataError

# What ChatLLaMA advises; fewer is a warning.
FLOAT32_MAX = 3.4028234663852886e38
ADVISED_ROWS = {"actor": 1000, "reward": 100, "prompts": 1000}


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion to imitate."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with a score; 0 is a score."""

    prompt: str
    completion: str
    score: float


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the first preferred."""

    prompt: str
    chosen: str
    rejected: str


Row = TypeVar("Row")


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Rows of the ACTOR stage. Raises DataError with file, row and field."""
    return _read(path, lambda row: Demonstration(row.text("user_input"), row.text("completion")))


def read_prompts(path: Path) -> list[str]:
    """Prompts of the RL stage; other fields of a row are not looked at. Raises DataError."""
    return _read(path, lambda row: row.text("user_input"))


def read_judgements(path: Path) -> list[ScoredCompletion] | list[Preference]:
    """Rows of the REWARD stage, all scored or all preferences.

    Raises:
        DataError: with file, row and field; also for a null score (which `generate_rewards.py` fills) and for
            a file that mixes both shapes.
    """
    rows = _read(path, _judgement)
    shapes = {type(row) for row in rows}
    if len(shapes) > 1:
        first = type(rows[0])
        odd = next(number for number, row in enumerate(rows, start=1) if type(row) is not first)
        raise DataError(
            f"{path}, row {odd}: scored rows (completion, score) and preference rows (chosen, rejected) are mixed; "
            "keep one shape a file"
        )
    return rows


@dataclass(frozen=True)
class _RawRow:
    """One JSON object with the place it came from."""

    values: dict[str, Any]
    place: str  # "file.json, row 3"

    def text(self, field: str) -> str:
        if field not in self.values:
            have = ", ".join(map(repr, self.values)) or "no fields"
            raise DataError(f"{self.place}: field {field!r} is missing (found {have}); add it")
        value = self.values[field]
        if not isinstance(value, str):
            raise DataError(f"{self.place}, field {field!r}: expected text, got {_describe(value)}")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of an emoji, where a program cut the text in the middle
            raise DataError(
                f"{self.place}, field {field!r}: character {error.start + 1} is half of a surrogate pair, which is no "
                "text; correct or remove it"
            ) from None
        return value


def _judgement(row: _RawRow) -> ScoredCompletion | Preference:
    if "chosen" in row.values or "rejected" in row.values:
        return Preference(row.text("user_input"), row.text("chosen"), row.text("rejected"))
    prompt, completion = row.text("user_input"), row.text("completion")
    if "score" not in row.values:
        raise DataError(
            f"{row.place}: field 'score' is missing; give a number, or use preference rows with 'chosen' and 'rejected'"
        )
    score = row.values["score"]
    if score is None:
        raise DataError(
            f"{row.place}, field 'score': it is null; score the file first: python artifacts/generate_rewards.py FILE"
        )
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise DataError(f"{row.place}, field 'score': expected a number, got {_describe(score)}")
    # Compared as Python numbers: an integer of any length is allowed in JSON, and losses are computed in float32.
    if not -FLOAT32_MAX <= score <= FLOAT32_MAX:
        shown = str(score) if len(str(score)) <= 40 else f"{str(score)[:37]}..."
        raise DataError(f"{row.place}, field 'score': {shown} is not a finite number; correct or remove the row")
    return ScoredCompletion(prompt, completion, float(score))


def _read(path: Path, convert: Callable[[_RawRow], Row]) -> list[Row]:
    rows = [convert(row) for row in _raw_rows(path)]
    if not rows:
        raise DataError(f"{path}: it holds no rows; a dataset needs at least one")
    return rows


def _raw_rows(path: Path) -> Iterator[_RawRow]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # with or without the mark that some editors set
    except FileNotFoundError:
        raise DataError(f"{path}: the file does not exist; correct the path in the configuration") from None
    except IsADirectoryError:
        raise DataError(f"{path}: it is a folder; name the JSON or JSONL file in it") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    # A JSONL file by name, or by its first character: a JSON array starts with "[".
    if path.suffix == ".jsonl" or text.lstrip()[:1] == "{":
        numbered = ((number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
        objects = ((number, _parse(line, path, number)) for number, line in numbered)
    else:
        parsed = _parse(text, path, None)
        if not isinstance(parsed, list):
            raise DataError(f"{path}: expected a list of rows, got {_describe(parsed)}")
        objects = enumerate(parsed, start=1)
    for number, value in objects:
        place = f"{path}, row {number}"
        if not isinstance(value, dict):
            raise DataError(f"{place}: expected an object with fields, got {_describe(value)}")
        yield _RawRow(value, place)


def _parse(text: str, path: Path, row: int | None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"row {row}" if row is not None else f"line {error.lineno}"
        raise DataError(f"{path}, {place}, column {error.colno}: broken JSON ({error.msg}); correct the file") from None
    except (ValueError, RecursionError) as error:  # valid JSON that Python declines, such as a number of 5,000 digits
        place = f"row {row}" if row is not None else "its JSON"
        raise DataError(f"{path}, {place}: cannot be read ({error}); correct the file") from None


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {shown if len(shown) <= 40 else shown[:37] + '...'}"
