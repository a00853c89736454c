"""The comparison of two runs as a table: what differs line by line, what is equal counted."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from chatrlhf.tools.reproduce.compare import Compared

COLOURS = {"equal": "green", "within": "yellow", "differs": "red"}
WIDTH = 120  # that names have room in
WORDS = {"equal": "equal", "within": "within tolerance", "differs": "differs"}


def show(console: Console, compared: Sequence[Compared], tolerance: float) -> None:
    """Print each comparison."""
    table = Table(title="the run and its reproduction", title_justify="left")
    for name in ("left by both", "compared", "largest difference", "at"):
        table.add_column(name, overflow="fold")
    table.add_column("verdict")
    for each in compared:
        verdict = each.verdict(tolerance)
        shown = "-" if math.isinf(each.difference) else f"{each.difference:.1e}" if each.difference else "0"
        table.add_row(each.what, each.size, shown, each.where, f"[{COLOURS[verdict]}]{WORDS[verdict]}")
    console.print(table, width=max(console.width, WIDTH))


def summary(compared: Sequence[Compared], tolerance: float) -> str:
    """How many came out how."""
    verdicts = [each.verdict(tolerance) for each in compared]
    allowed = f" (up to {tolerance:g})" if tolerance else ""
    counts = [f"{verdicts.count(name)} {WORDS[name]}" + (allowed if name == "within" else "") for name in COLOURS]
    return f"{len(compared)} comparisons: " + ", ".join(counts)
