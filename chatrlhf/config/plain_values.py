"""Plain values of a key: a switch is no number, text is printable and not empty, nothing stands twice in a list."""

from __future__ import annotations

import typing
import unicodedata
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel

MAX_SEED = 2**63 - 1  # PyTorch's and Python's own counters end here
MAX_ROWS = 2**20  # of one batch, or of one rollout
MAX_TOKENS = 10**8  # of one text; models were published with a context of ten million
MAX_STEPS = 10**12  # of a stage; far enough for "never"
MAX_SCORE = 10**8  # of a reward; its square is still exact enough in float32
MAX_TEXT = 100_000  # characters: a template may be written out
LEAST = 1e-30  # of a number that is not 0: in float32 its square is 0 already

SWITCH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "t", "f"})
SEVERAL_LINES = frozenset({"template", "stop", "chat_template_kwargs"})  # of these line breaks and tabs are a part


def check_plain(name: str, value: Any, annotation: Any) -> None:
    """Refuse what the type of a key alone would take for something else.

    Args:
        name: the key's.
        value: as written, before it is converted; sections in it are left to themselves.
        annotation: the key's type.

    Raises:
        ValueError: what is wrong and what is expected; it does not name the key.
    """
    kinds = _kinds(annotation)
    if isinstance(value, (list, tuple)):
        _check_repeats(value, annotation)
    if BaseModel in kinds or value is None:
        return
    if isinstance(value, dict):
        for key, each in value.items():
            _check_one(name, key, kinds)
            _check_one(name, each, kinds)
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check_one(name, each, kinds)
    else:
        _check_one(name, value, kinds)


def _check_one(name: str, value: Any, kinds: frozenset[type]) -> None:
    if isinstance(value, bool):
        if bool not in kinds:
            expected = "text; in quotes, as YAML takes yes, no, on and off for these" if str in kinds else "a number"
            raise ValueError(f"expected {expected}, got {str(value).lower()}")
    elif isinstance(value, (int, float)):
        if kinds == {bool}:
            raise ValueError(f"expected true or false, got {_shown(value)}")
        if isinstance(value, int) and abs(value) > MAX_SEED:
            raise ValueError(f"a number of {_digits(value)} digits is more than {MAX_SEED:.1e}; give a smaller one")
        if 0 < abs(value) < LEAST:
            raise ValueError(f"{value} is not 0 and less than {LEAST:g}; give 0 or a larger number")
    elif isinstance(value, str):
        _check_text(name, value)
        if kinds == {bool} and value.strip().lower() not in SWITCH_WORDS:
            raise ValueError(f"expected true or false, got {_shown(value)}")
        if str not in kinds:
            _check_number_in_text(value)
    elif isinstance(value, (bytes, bytearray, set, frozenset)):
        raise ValueError(f"expected {_expected(kinds)}, got a {type(value).__name__} of YAML")


def _check_text(name: str, text: str) -> None:
    if not text.strip() and not (name in SEVERAL_LINES - {"template"} and text):
        raise ValueError(f"expected a value, got the empty text {_shown(text)}; write null where there is none")
    if len(text) > MAX_TEXT:
        raise ValueError(f"a text of {len(text):,} characters is more than {MAX_TEXT:,}; put it into a file")
    allowed = "\n\r\t" if name in SEVERAL_LINES else ""
    for place, character in enumerate(text):
        if unicodedata.category(character) in ("Cc", "Cs") and character not in allowed:
            raise ValueError(
                f"character {place + 1} of {_shown(text)} is {character!r}, which cannot be printed; remove it"
            )


def _check_number_in_text(text: str) -> None:
    """``5e-6`` is text in YAML 1.1, and taken as the number that it looks like; others are left to the type."""
    try:
        number = float(text)
    except ValueError:
        return
    if 0 < abs(number) < LEAST:
        raise ValueError(f"{text} is not 0 and less than {LEAST:g}; give 0 or a larger number")


def _check_repeats(values: list[Any] | tuple[Any, ...], annotation: Any) -> None:
    if tuple in _origins(annotation):
        return  # each place has a meaning of its own
    seen: list[Any] = []
    for value in values:
        if any(type(value) is type(other) and value == other for other in seen):
            raise ValueError(f"{_shown(value)} stands in it twice; keep one")
        seen.append(value)


def _expected(kinds: frozenset[type]) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text"}
    return " or ".join(dict.fromkeys(names[kind] for kind in (bool, int, float, str) if kind in kinds))


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:60]}…"


def _digits(value: int) -> int:
    return int(value.bit_length() * 0.30103) + 1  # Python does not write out numbers of thousands of digits


@cache
def _origins(annotation: Any) -> frozenset[Any]:
    """The containers in a type."""
    inner = [_origins(each) for each in typing.get_args(annotation) if typing.get_origin(annotation) is not Literal]
    return frozenset({typing.get_origin(annotation)}).union(*inner)


@cache
def _kinds(annotation: Any) -> frozenset[type]:
    """The types of single values in a type: ``int`` and ``str`` of ``list[int | str] | None``."""
    if typing.get_origin(annotation) is Literal:
        return frozenset(type(each) for each in typing.get_args(annotation))
    if isinstance(annotation, type) and not typing.get_args(annotation):
        return frozenset({BaseModel if issubclass(annotation, BaseModel) else annotation} - {type(None)})
    return frozenset().union(*map(_kinds, typing.get_args(annotation)))
