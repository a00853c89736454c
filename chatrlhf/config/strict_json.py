"""JSON with the checks that Python's parser leaves out: keys given twice, and values nested too deep to be handled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError

MAX_DEPTH = 100  # levels; Python's own functions on values give up at about a thousand, some of them at 300


class JsonFault(ValueError):
    """Why a text is not accepted as JSON.

    Args:
        reason: what is wrong, without a place.
        line, column: where, counted from 1; None where the parser does not say.
    """

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line, self.column = reason, line, column


def parse_row(text: str) -> Any:
    """The value of a text. NaN and Infinity, which Python writes, are numbers. Raises JsonFault."""
    return _decoded(_ROW, text)


def parse_settings(text: str) -> Any:
    """The value of a text; NaN and Infinity are refused, because they are not JSON. Raises JsonFault."""
    return _decoded(_SETTINGS, text)


def load_settings(path: Path) -> Any:
    """The value in a file of settings. Raises ConfigError with file and, where it is known, line."""
    try:
        return parse_settings(path.read_text(encoding="utf-8-sig"))
    except JsonFault as fault:
        line = f", line {fault.line}" if fault.line else ""
        raise ConfigError(f"{path}{line}: cannot be read as JSON ({fault.reason}); correct the file") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read as JSON ({reason}); correct the path or the file") from None


def collecting_decoder(repeated: list[str]) -> json.JSONDecoder:
    """A decoder that adds keys given twice to a list and reads on, for texts that hold many values."""
    return json.JSONDecoder(object_pairs_hook=_unique(repeated.append))


def check_depth(value: Any, brackets: int) -> None:
    """Refuse a value that is nested too deep.

    Args:
        brackets: opening ones in its text, an upper bound of its depth.

    Raises:
        JsonFault: it has more than `MAX_DEPTH` levels.
    """
    if brackets <= MAX_DEPTH:
        return
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
    if level:
        raise _too_deep()


def explain(error: Exception) -> JsonFault:
    """What the parser raised, as a JsonFault."""
    if isinstance(error, JsonFault):
        return error
    if isinstance(error, json.JSONDecodeError):
        return JsonFault(f"broken JSON ({error.msg})", error.lineno, error.colno)
    if isinstance(error, RecursionError):
        return _too_deep()
    return JsonFault(f"cannot be read ({error})")  # a number of 5,000 digits


def _decoded(decoder: json.JSONDecoder, text: str) -> Any:
    try:
        value = decoder.decode(text)
        check_depth(value, text.count("[") + text.count("{"))
    except _Repeated as error:
        raise JsonFault(f"key {error.key!r} is given twice", _second_line(text, error.key)) from None
    except (ValueError, RecursionError) as error:
        raise explain(error) from None
    return value


class _Repeated(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _refuse(key: str) -> None:
    raise _Repeated(key)


def _unique(repeated: Callable[[str], None]) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def built(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated(next(key for key in keys if keys.count(key) > 1))
        return values

    return built


def _no_constant(name: str) -> Any:
    raise JsonFault(f"{name} is not a JSON number")


_ROW = json.JSONDecoder(object_pairs_hook=_unique(_refuse))
_SETTINGS = json.JSONDecoder(object_pairs_hook=_unique(_refuse), parse_constant=_no_constant)


def _second_line(text: str, key: str) -> int | None:
    """The line of a key that stands twice in the whole text; None where it stands in several objects."""
    places = [found.start() for found in re.finditer(rf"{re.escape(json.dumps(key))}\s*:", text)]
    return text.count("\n", 0, places[1]) + 1 if len(places) == 2 else None


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _too_deep() -> JsonFault:
    return JsonFault(f"it is nested more than {MAX_DEPTH} levels deep")
