"""Public fault reports and the tests that hold them off: `@report` on a test names what was met elsewhere.

`python tests/field_reports.py` prints the table of `docs/correctness.md`; a test finds drift between the two.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

FIELD = Path(__file__).parent / "field"
HEADER = "| reported as | fault | what happens here | test |\n|---|---|---|---|"

Test = TypeVar("Test", bound=Callable[..., None])


@dataclass(frozen=True)
class Report:
    """A fault that people met, and what this project does in its place."""

    sources: tuple[str, ...]  # "owner/name#123", or the reason why there is none
    fault: str
    expected: str
    test: str  # "file.py::name"

    def row(self) -> str:
        return f"| {', '.join(self.sources)} | {self.fault} | {self.expected} | `{self.test}` |"


REPORTS: list[Report] = []


def report(*sources: str, fault: str, expected: str) -> Callable[[Test], Test]:
    """Mark a test as the answer to public reports.

    Args:
        sources: issues of public trackers, such as ``"huggingface/trl#204"``.
        fault: input and symptom, in a phrase.
        expected: the right value or the refusal that the test asserts, in a phrase.
    """

    def mark(test: Test) -> Test:
        file = Path(test.__code__.co_filename).name
        REPORTS.append(Report(sources, fault, expected, f"{file}::{test.__name__}"))
        return test

    return mark


def table() -> str:
    """All reports as a Markdown table, by file and then in the order in which they stand there."""
    REPORTS.clear()
    for path in (str(FIELD), str(FIELD.parent)):
        if path not in sys.path:
            sys.path.insert(0, path)
    for path in sorted(FIELD.glob("test_*.py")):
        module = sys.modules.get(path.stem)
        importlib.reload(module) if module else importlib.import_module(path.stem)
    return "\n".join([HEADER, *(each.row() for each in REPORTS)])


if __name__ == "__main__":
    sys.modules["field_reports"] = sys.modules["__main__"]  # the tests import it by this name
    print(table())
