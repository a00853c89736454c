"""Does an iteration's time grow as it must? Twice the rollouts, the response or the hidden size, each alone.

    python -m benchmarks.growth --base small-fixed

The time that a PPO iteration of this package takes, next to t* of `ppo_step/bound.py`, both as multiples of what they
are for the base work. Their ratio says how much of the growth is this package's own doing: above 1 something grows
faster than the work does. Rates are measured at each work's own shapes between the runs, as t* wants them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_step.bound import Rates, bound, measure
from benchmarks.ppo_step.work import WORKS, Work, prepare
from benchmarks.processes import alternating, cell, run

DOUBLED = ("rollouts", "response", "hidden")
MAX_RATIO = 1.15


def grown(base: Work) -> dict[str, Work]:
    """The base work and it with one size doubled; epochs and the number of minibatches stay."""
    works = {"base": base}
    for size in DOUBLED:
        works[size] = replace(base, name=f"{base.name}, {size} doubled", **{size: 2 * getattr(base, size)})
    return works


def necessary(work: Work, rates: Rates, iterations: int) -> float:
    """t* of one iteration, seconds: the median over those that are measured."""
    bounds = [bound(work, rates, i, weight_bytes=2) for i in range(1, iterations + 1)]
    return statistics.median(sum(each.values()) for each in bounds)


def growths(seconds: dict[str, float], stars: dict[str, float]) -> dict[str, tuple[float, float, float]]:
    """Measured growth, t*'s growth and their ratio for each doubled size, from seconds of one iteration."""
    found = {}
    for size in DOUBLED:
        measured, predicted = seconds[size] / seconds["base"], stars[size] / stars["base"]
        found[size] = (measured, predicted, measured / predicted)
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """All runs, and the rates between them."""
    works = grown(WORKS[options.base])
    with tempfile.TemporaryDirectory() as name:
        for size, work in works.items():
            (Path(name) / size).mkdir()
            prepare(work, Path(name) / size)
        runs: dict[str, list[dict[str, Any]]] = {size: [] for size in works}
        rates: dict[str, list[Rates]] = {size: [] for size in works}
        for size in alternating(list(works), options.repeats):
            rates[size].append(measure(works[size], torch.bfloat16))
            folder = str(Path(name) / size)
            command = [sys.executable, "-m", "benchmarks.ppo_step.ours", folder, str(options.iterations + 1)]
            runs[size].append(run([*command, *options.set], options.threads))
    totals = {
        size: [each["total"] for one in found for each in one["iterations"][1:]]  # the first is warm-up
        for size, found in runs.items()
    }
    # Rates rise and fall with the machine's mood, and so do the times: t* is taken of the median run's.
    stars = {
        size: statistics.median(necessary(works[size], each, options.iterations) for each in found)
        for size, found in rates.items()
    }
    return {
        "works": {size: asdict(work) for size, work in works.items()},
        "totals": totals,
        "rates": {size: [asdict(each) for each in found] for size, found in rates.items()},
        "stars": stars,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    seconds = {size: statistics.median(totals) for size, totals in result["totals"].items()}
    stars = result["stars"]
    lines = [
        f"| doubled | s (least–greatest) | t*, s | grows | t* grows | ratio (at most {MAX_RATIO}) |",
        "|---|---:|---:|---:|---:|---:|",
        f"| nothing | {cell(result['totals']['base'])} | {stars['base']:.3f} | | | |",
    ]
    for size, (measured, predicted, ratio) in growths(seconds, stars).items():
        lines.append(
            f"| {size} | {cell(result['totals'][size])} | {stars[size]:.3f} | {measured:.2f} | {predicted:.2f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--base", default="small-fixed", choices=list(WORKS))
    parser.add_argument("--repeats", type=int, default=4, help="runs of each work")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each run, behind one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override our configuration")
    parser.add_argument("--json", type=Path, help="write all raw figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = compare(options)
    print(f"base: {options.base}, {options.threads} threads\n\n{markdown(result)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
