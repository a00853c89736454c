"""Perplexities over contexts, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from chatrlhf.evaluation.perplexity import Ladder


def show_ladders(console: Console, ladders: Sequence[Ladder], title: str) -> None:
    """A row for each context, a column for each model; * beyond its positions, - where it has none."""
    table = Table(title=title)
    table.add_column("context", justify="right")
    for ladder in ladders:
        table.add_column(ladder.name, justify="right")
    for context in sorted({context for ladder in ladders for context in ladder.perplexity}):
        cells = []
        for ladder in ladders:
            value = ladder.perplexity[context]
            beyond = "*" if context > ladder.positions else ""
            cells.append("-" if value is None else f"{value:.2f}{beyond}")
        table.add_row(f"{context:,}", *cells)
    console.print(table)
