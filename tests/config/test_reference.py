"""The page of configuration keys is the schema's, and every key is read by code or named as one without effect."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

import chatrlhf
from chatrlhf.config.load import WITHOUT_EFFECT
from chatrlhf.config.model import PeftConfig
from chatrlhf.config.reference import page
from chatrlhf.config.schema import Config

PACKAGE = Path(chatrlhf.__file__).parent
DEFINED_IN = {PACKAGE / "config" / name for name in ("reference.py", "on_resume.py")}
# Read by pydantic itself, or handed over whole to the library whose names they have.
HANDED_OVER = {"actor_config.rope_scaling", "reward_config.rope_scaling"}


def keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str | None]]:
    """(dotted key, its last name, its description) of every key."""
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}", name, info.description
        for each in (info.annotation, *typing.get_args(info.annotation)):
            if isinstance(each, type) and issubclass(each, BaseModel):
                yield from keys(each, f"{prefix}{name}.")


def names_read() -> set[str]:
    """Attributes that code reads, and texts that stand alone in it (keys that are looked up by name)."""
    found = set()
    for path in set(PACKAGE.rglob("*.py")) - DEFINED_IN:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if path.name == "aliases.py":  # its tables name keys, and read none
            tree.body = [node for node in tree.body if not isinstance(node, ast.Assign | ast.AnnAssign)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)
    return found


def test_the_page_is_the_schemas():
    written = (PACKAGE.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m chatrlhf.config.reference > docs/configuration.md"


@pytest.mark.parametrize("model", [Config, PeftConfig])
def test_every_key_says_what_it_means(model):
    sections = {name for name, info in model.model_fields.items() if info.default_factory is not None}
    silent = [key for key, name, said in keys(model) if not said and name not in sections]
    assert [key for key in silent if key not in ("peft_type", "inference_mode", "bias")] == []


def test_every_key_is_read_or_named_as_one_without_effect():
    read = names_read()
    dead = [
        key
        for key, name, _ in keys(Config)
        if name not in read and key not in WITHOUT_EFFECT and key.rpartition(".")[0] not in HANDED_OVER
    ]
    assert dead == []
    assert WITHOUT_EFFECT.keys() <= {key for key, _, _ in keys(Config)}
