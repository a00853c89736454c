"""YAML as settings are written in it: keys given twice are refused, a bare ``None`` is null, and size is bounded."""

from __future__ import annotations

import re
from typing import Any

import yaml

NULL = "tag:yaml.org,2002:null"
MAX_CHARACTERS = 1_000_000  # a file's, comments among them
MAX_VALUES = 20_000  # keys, items and values, each alias counted as what it stands for; a large file has some hundreds
MAX_DEPTH = 100  # levels


class YamlFault(ValueError):
    """Why a text is not accepted as YAML: the reason in one line, and the line it is about where that is known."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain data, as from ``yaml.safe_load``. Raises YamlFault."""
    if len(text) > MAX_CHARACTERS:
        raise YamlFault(f"it has more than {MAX_CHARACTERS:,} characters; settings need fewer")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        if isinstance(error, _TooLarge):
            raise YamlFault(str(error), mark and mark.line + 1) from None
        said = [text for text in (getattr(error, "context", None), getattr(error, "problem", None)) if text]
        reason = " ".join((", ".join(said) or str(error)).split())
        raise YamlFault(reason, mark and mark.line + 1) from None
    except RecursionError:
        raise YamlFault("it is nested too deep") from None


class _TooLarge(yaml.composer.ComposerError):
    """More than settings have."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(None, None, problem, mark)

    def __str__(self) -> str:
        return str(self.problem)


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would take the last of several values and raise many kinds of errors about one."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._weights: dict[yaml.Node, int] = {}  # how many values a node that is complete stands for
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> yaml.Node:
        # Counted while it is read, so that neither a long text nor aliases of aliases are ever built.
        mark = self.peek_event().start_mark
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _TooLarge(f"it is nested more than {MAX_DEPTH} levels deep", mark)
        before = self._values
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if node in self._weights:  # an alias
            self._values += self._weights[node]
        else:
            self._values += 1
            self._weights[node] = self._values - before
        if self._values > MAX_VALUES:
            raise _TooLarge(
                f"it holds more than {MAX_VALUES:,} values, with what its aliases (*name) repeat; settings need fewer",
                mark,
            )
        return node

    def construct_yaml_int(self, node: Any) -> int:
        # By YAML 1.1 010 is eight and 1:30 is ninety, which no one means.
        if ":" in node.value or re.match(r"[-+]?0[0-9_]", node.value):
            problem = f"{node.value!r} is not a decimal number; write it without a colon or a zero before it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: Any) -> float:
        if ":" in node.value:
            problem = f"{node.value!r} is not a decimal number; quote it as text, or write it without a colon"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return super().construct_yaml_float(node)

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


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)
_StrictLoader.add_constructor("tag:yaml.org,2002:float", _StrictLoader.construct_yaml_float)
# ChatLLaMA's files write null as Python does. A quoted "None" is text, as any other word in quotes.
_StrictLoader.add_implicit_resolver(NULL, re.compile("^None$"), ["N"])
