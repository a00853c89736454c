"""Bars of an iteration's phases, from the raw figures of `python -m benchmarks.ppo_step --json FILE`.

python -m benchmarks.plot FILE ppo_step.svg
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

PHASES = {"rollout": "#4477aa", "score": "#ccbb44", "update": "#ee6677"}  # told apart by the color-blind, too


def bars(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """(label, seconds of each phase) of every work and engine; medians, without the first iteration of a run."""
    found = []
    for result in results:
        for engine, runs in result["runs"].items():
            kept = [each for one in runs for each in one["iterations"][1:]]
            phases = {phase: statistics.median(each[phase] for each in kept) for phase in PHASES}
            found.append((f"{result['work']['name']}\n{engine}", phases))
    return found


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """Write the picture; its kind is the ending's: png, svg, pdf.

    Raises:
        SystemExit: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "benchmarks.plot needs matplotlib: pip install 'chatrlhf[dev]' or pip install matplotlib"
        ) from None
    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    found = bars(results)
    figure, axes = pyplot.subplots(figsize=(7, 0.6 + 0.55 * len(found)), layout="constrained")
    labels, ends = [label for label, _ in found], [0.0] * len(found)
    for phase, color in PHASES.items():
        seconds = [phases[phase] for _, phases in found]
        axes.barh(labels, seconds, left=ends, color=color, label=phase)
        ends = [end + more for end, more in zip(ends, seconds, strict=True)]
    for place, end in enumerate(ends):
        axes.text(end, place, f" {end:.2f}", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("seconds per PPO iteration, medians")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PHASES), frameon=False)
    figure.savefig(target)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__.split("\n")[0])
    parser.add_argument("figures", type=Path, help="what --json wrote, of ppo_step or of trlx_standin")
    parser.add_argument("target", type=Path, help="the picture: .svg or .png")
    options = parser.parse_args()
    draw(json.loads(options.figures.read_text(encoding="utf-8")), options.target)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
