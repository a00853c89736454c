"""Perplexities over contexts, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chatrlhf.errors import ConfigError
from chatrlhf.evaluation.perplexity import Ladder


def save_ladders(ladders: Sequence[Ladder], path: Path) -> None:
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
    for ladder in ladders:
        known = [(context, value) for context, value in ladder.perplexity.items() if value is not None]
        axes.loglog(*zip(*known, strict=True), marker="o", base=2, label=ladder.name)
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: it cannot be written ({error})") from None
