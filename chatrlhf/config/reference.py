"""The page of configuration keys, made of the schema: `python -m chatrlhf.config.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from chatrlhf.config.aliases import RENAMED
from chatrlhf.config.load import WITHOUT_EFFECT
from chatrlhf.config.model import PeftConfig
from chatrlhf.config.on_resume import OnResume, rules
from chatrlhf.config.plain_values import MAX_SEED
from chatrlhf.config.schema import Config

HEADER = """# Configuration

Every key of the YAML file, by section; this page is made of the schema by `python -m chatrlhf.config.reference`, and a
test compares the two. `--set section.key=value` overrides one. An unknown key is an error that names the nearest known
one. Behind a type stand the numbers that it takes: `[0, 1)` holds 0 and not 1. *Other names* are ChatLLaMA's, trlX's or
Hugging Face's for the same key. The last column says what `--resume` does with a key that has changed since.
"""
RESUME = {
    OnResume.TAKES_EFFECT: "takes effect",
    OnResume.REFUSED: "refused",
    OnResume.BY_CONTENT: "same content",
    OnResume.NO_EFFECT: "–",
}

BOUNDS = ("ge", "gt", "le", "lt")


def page() -> str:
    """The whole page, in Markdown."""
    return "\n".join([HEADER, *_section(Config, ""), *_section(PeftConfig, "The file of `peft_config_path`")]) + "\n"


def _section(model: type[BaseModel], name: str) -> Iterator[str]:
    """A table of a section's own keys, then those of the sections in it."""
    inner = {key: _model_in(info.annotation) for key, info in model.model_fields.items()}
    own = {key: info for key, info in model.model_fields.items() if inner[key] is None}
    is_file = model is PeftConfig
    yield f"## {f'`{name}`' if name and not is_file else name or 'Top level'}\n"
    yield f"{_first_paragraph(model)}\n"
    yield "| key | type | default | meaning | other names | on resume |\n|---|---|---|---|---|---|"
    for key, info in own.items():
        yield _row(name, key, info, is_file)
    yield ""
    for key, section in inner.items():
        if section is not None:
            yield from _section(section, f"{name}.{key}".lstrip("."))


def _row(section: str, key: str, info: FieldInfo, is_file: bool) -> str:
    dotted = f"{section}.{key}".lstrip(".")
    meaning = info.description or ""
    if dotted in WITHOUT_EFFECT and "without effect" not in meaning:
        meaning = f"{meaning}; without effect: {WITHOUT_EFFECT[dotted]}"
    others = [theirs for theirs, ours in RENAMED.get(section, {}).items() if ours == key]
    rule = rules().get(dotted)
    if rule is None and not is_file:
        # Of `rope_scaling` and `datasets`, which are compared whole.
        rule = rules().get(section) or rules().get(section.removesuffix("[]"))
    cells = [
        f"`{key}`",
        _type(info.annotation) + _band(info),
        _default(info),
        meaning,
        ", ".join(f"`{name}`" for name in others),
        RESUME[rule.on_resume] if rule is not None else "same content" if is_file else "refused",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _first_paragraph(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split("\n\n")[0].split())


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for each in (annotation, *typing.get_args(annotation)):
        if isinstance(each, type) and issubclass(each, BaseModel):
            return each
    return None


def _type(annotation: Any) -> str:
    """As a person would say it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " \\| ".join(f"`{each}`" for each in arguments).replace("\\|", "|")
    if origin in (types.UnionType, typing.Union):
        kinds = [_type(each) for each in arguments if each is not type(None)]
        return " or ".join([*kinds, *(["null"] if type(None) in arguments else [])])
    if origin in (list, tuple):
        inner = ", ".join(dict.fromkeys(_type(each) for each in arguments if each is not Ellipsis))
        return f"list of {inner}" if origin is list else f"{len(arguments)} of {inner}"
    if origin is dict:
        return f"map of {_type(arguments[0])} to {_type(arguments[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _band(info: FieldInfo) -> str:
    """Which numbers a key takes, behind its type: `[0, 1)` holds 0 and not 1."""
    bound = {name: getattr(each, name) for each in info.metadata for name in BOUNDS if hasattr(each, name)}
    if not bound:
        return ""
    low = f"[{_number(bound['ge'])}" if "ge" in bound else f"({_number(bound['gt'])}"
    high = f"{_number(bound['le'])}]" if "le" in bound else f"{_number(bound['lt'])})"
    return f" in {low}, {high}"


def _number(bound: float) -> str:
    if bound == MAX_SEED:
        return "2^63 - 1"
    power = len(str(bound)) - 1
    return f"10^{power}" if bound == 10**power and power > 3 else f"{bound:,}"


def _default(info: FieldInfo) -> str:
    if info.default_factory is not None:
        return "`{}`" if typing.get_origin(info.annotation) is dict else "`[]`"
    if info.default is PydanticUndefined:
        return "required"
    if info.default is None:
        return "null"
    value = list(info.default) if isinstance(info.default, tuple) else info.default
    return f"`{value}`"


if __name__ == "__main__":
    print(page(), end="")
