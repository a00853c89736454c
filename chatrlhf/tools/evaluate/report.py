"""Perplexities over contexts, as a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from chatrlhf.errors import ConfigError
from chatrlhf.tools.evaluate.perplexity import PerplexityCurve


def save_curves(curves: Sequence[PerplexityCurve], path: Path) -> None:
    """Write a line for each model, both axes logarithmic, as an image of the kind that the file's ending names.

    Raises:
        ConfigError: matplotlib is not installed, or it cannot write such a file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError('--picture needs matplotlib: pip install "chatrlhf[plots]"') from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        known = [(context, value) for context, value in curve.perplexity.items() if value is not None]
        axes.loglog(*zip(*known, strict=True), marker="o", base=2, label=curve.name)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: it cannot be written ({error})") from None


def show_curves(console: Console, curves: Sequence[PerplexityCurve], title: str) -> None:
    """A row for each context, a column for each model; * beyond its positions, - where it has none."""
    table = Table(title=title)
    table.add_column("context", justify="right")
    for curve in curves:
        table.add_column(curve.name, justify="right")
    for context in sorted({context for curve in curves for context in curve.perplexity}):
        cells = []
        for curve in curves:
            value = curve.perplexity[context]
            beyond = "*" if context > curve.positions else ""
            cells.append("-" if value is None else f"{value:.2f}{beyond}")
        table.add_row(f"{context:,}", *cells)
    console.print(table)
