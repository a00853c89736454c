"""Results of checks for the terminal, and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from chatrlhf.errors.redaction import redacted, redacted_tree
from chatrlhf.runtime.check_result import CheckResult

COLOURS = {"pass": "green", "warn": "yellow", "fail": "red"}


def show(console: Console, result: CheckResult) -> None:
    """A line, and below it the remedy."""
    measured = redacted(result.measured)
    line = Text.assemble((result.status, COLOURS[result.status]), "  ", (result.name, "bold"), f": {measured}")
    console.print(line, soft_wrap=True)
    if result.remedy:
        console.print(f"      -> {redacted(result.remedy)}", markup=False, highlight=False, soft_wrap=True)


def summary(results: Sequence[CheckResult]) -> str:
    """How many of which kind."""
    counts = Counter(result.status for result in results)
    return f"{len(results)} checks: " + ", ".join(f"{counts[status]} {status}" for status in COLOURS)


def as_json(results: Sequence[CheckResult]) -> dict[str, Any]:
    """One object, whose ``status`` is the worst of all."""
    statuses = {result.status for result in results}
    worst = next(status for status in ("fail", "warn", "pass") if status in statuses)
    return {"status": worst, "checks": [redacted_tree(asdict(result)) for result in results]}
