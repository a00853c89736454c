"""Values that make no sense, for every key of the schema by its kind; and of these the few that do, with the reason."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel

from chatrlhf.config.schema import Config

# No key takes one of these, but for what `SENSIBLE` names.
FOR_ALL: dict[str, Any] = {
    "not a number": float("nan"),
    "minus infinity": float("-inf"),
    "1e30": 1e30,
    "beyond 64 bits": 2**64,
    "nearly nothing": 1e-300,
    "empty text": "",
    "a null character": "a\0b",
    "a lone surrogate": "a\ud800b",
    "a list of lists": [[1]],
    "bytes": b"ab",
}
FOR_KINDS: dict[type, dict[str, Any]] = {
    bool: {"one": 1, "zero": 0, "a word": "perhaps", "a mapping": {}},
    int: {"a switch": True, "a fraction": 2.5, "a word": "ten", "below all": -2, "above all": 10**18, "a mapping": {}},
    float: {"a switch": True, "infinity": float("inf"), "a word": "fast", "below all": -2, "above all": 10**18},
    str: {"a switch": False, "a number": 7, "blanks": "  ", "a long text": "x" * 200_000},
    tuple: {
        "a word": "high",
        "three": [1, 1, 1],
        "a switch": True,
        "switches": [True, False],
        "huge": [None, 1e30],
        "below all": [None, -1e7],
    },
    list: {"a word": "abc", "twice the same": ["a", "a"], "a mapping": {"a": 1}, "a switch": True},
    dict: {"a word": "abc", "a list": ["a"], "a switch": True},
    BaseModel: {"a word": "abc", "a number": 7, "a list": ["a"], "a switch": True},
}
# (key, value's name) or (kind, value's name): why it is a sensible value all the same.
SENSIBLE: dict[tuple[Any, str], str] = {
    ("seed", "above all"): "any number of 64 bits seeds a generator",
    ("mixing_seed", "above all"): "any number of 64 bits seeds a generator",
    ("ref_mean", "below all"): "rewards may be negative",
    ("eval_best", "below all"): "criteria may be negative",
}


def keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration, dotted, with its type; a section's own among them."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", info.annotation
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from keys(info.annotation, f"{prefix}{name}.")


def kinds(annotation: Any) -> set[type]:
    """What a key takes: ``{int, list}`` of ``int | list[int] | None``."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return {type(each) for each in typing.get_args(annotation)}
    if origin in (list, tuple, dict):
        return {origin}
    if isinstance(annotation, type):
        return {BaseModel} if issubclass(annotation, BaseModel) else {annotation} - {type(None)}
    if origin is typing.Annotated:
        return kinds(typing.get_args(annotation)[0])
    return set().union(*map(kinds, typing.get_args(annotation)))


def odd_values() -> Iterator[tuple[str, str, Any]]:
    """(key, what the value is, value): none of them is sensible."""
    for key, annotation in keys():
        name, taken = key.rpartition(".")[2], kinds(annotation)
        # What another kind takes is no nonsense: a word for `int | str`.
        of_kinds = set.intersection(*(set(FOR_KINDS[kind]) for kind in taken)) if taken else set()
        values = FOR_ALL | {each: FOR_KINDS[next(iter(taken))][each] for each in of_kinds}
        yield from ((key, each, value) for each, value in values.items() if (name, each) not in SENSIBLE)
