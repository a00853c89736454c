"""YAML as settings are written in it: keys given twice are refused, and a bare ``None`` is null."""

from __future__ import annotations

import re
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"


class YamlFault(ValueError):
    """Why a text is not accepted as YAML: the reason in one line, and the line it is about where that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain data, as from ``yaml.safe_load``. Raises YamlFault."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = [text for text in (getattr(error, "context", None), getattr(error, "problem", None)) if text]
        reason = " ".join((", ".join(said) or str(error)).split())
        raise YamlFault(reason, mark and mark.line + 1) from None
    except RecursionError:
        raise YamlFault("it is nested too deep") from None


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would take the last of several values and raise many kinds of errors about one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not where dictionaries are built: there, the keys of anchors are merged in already, and a key
        # that overrides one of them stands twice.
        node = super().compose_mapping_node(anchor)
        first_line: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused when the dictionary is built
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in first_line:
                problem = f"key {key.value!r} is given twice, first in line {first_line[name]}; keep one"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first_line[name] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError):
            # Raised by a value that its own tag, or the form of a date or number, does not fit.
            problem = f"{str(node.value)[:40]!r} cannot be read as {node.tag.rpartition(':')[2]}; quote it as text"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


# ChatLLaMA's files write null as Python does. A quoted "None" is text, as any other word in quotes.
_StrictLoader.add_implicit_resolver(NULL, re.compile("^None$"), ["N"])
