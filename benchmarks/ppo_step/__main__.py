"""Time one PPO iteration of this package against TRL 1.12.0's, each in a process of its own, from the same files.

    make bench                                                        # sets up TRL's environment, runs the small works
    python -m benchmarks.ppo_step --peer-python .venv-peer/bin/python --works small-fixed small-natural
    python -m benchmarks.ppo_step --peer-python python3 --works gpu-1b-fixed --pairs 2    # on a GPU, 60 GB of disk

Runs alternate (ours, TRL, TRL, ours, …), the first iteration of each is dropped as warm-up, and figures are medians
over all others with their least and greatest. TRL runs at the fastest of its precisions in which it trains: all are
tried first, and one in which most of the policy's weights are what they were after 32 optimizer steps does not count.
Beside the times stands t*, the bound of `bound.py`, measured between the runs. Only ratios are worth quoting: the
machine is the same for both, but seldom the same twice. Where TRL 1.12.0 is not to be had, this package runs alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.ppo_step.bound import bound, measure
from benchmarks.ppo_step.work import WORKS, Work, prepare
from benchmarks.processes import ROOT, alternating, run, spread

PHASES = ("rollout", "score", "update", "total")
PEER_PRECISIONS = ("fp32", "bf16", "pure_bf16")  # "bf16" is autocast over fp32 weights, "pure_bf16" has no others
# What the table says of each engine besides seconds: name, what for, unit, digits, behind the ratio.
COUNTS = (
    ("samples/s", "samples/s", 1, ".1f", ""),
    ("tokens/s", "response tokens/s", 1, ".0f", ""),
    ("peak", "peak memory, MiB", 2**20, ".0f", " of it"),
)
# An engine trains if its steps reach the weights. In weights of bfloat16 steps of 3e-6 are rounded away.
LEAST_MOVED = 0.5


def has_peer(python: str) -> bool:
    """Whether that interpreter has the release of TRL that is compared with."""
    code = "from importlib.metadata import version; assert version('trl') == '1.12.0'; import trl.experimental.ppo"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError:
        found = None
    if found is None or found.returncode != 0:
        why = found.stderr.strip().splitlines()[-1] if found is not None and found.stderr.strip() else "no such program"
        print(f"this package alone: {python} cannot run TRL 1.12.0's PPOTrainer ({why})", flush=True)
        return False
    return True


def best_precision(work: Work, options: argparse.Namespace, folder: Path) -> tuple[dict[str, Any], str]:
    """A run of TRL in each precision, and the name of the fastest in which it trains."""
    tried = {name: run(commands(options, folder, 2, name)["TRL"], options.threads) for name in PEER_PRECISIONS}
    seconds = {name: min(each["total"] for each in one["iterations"]) for name, one in tried.items()}
    print(
        f"{work.name}: TRL's iteration "
        + ", ".join(f"{name} {seconds[name]:.2f} s ({tried[name]['moved']:.0%} moved)" for name in tried),
        flush=True,
    )
    return tried, min((name for name in tried if tried[name]["moved"] > LEAST_MOVED), key=seconds.get)


def commands(options: argparse.Namespace, folder: Path, iterations: int, precision: str | None) -> dict[str, list[str]]:
    """How each engine is started; TRL only where it has a precision."""
    ours = [sys.executable, "-m", "benchmarks.ppo_step.ours", str(folder), str(iterations), *options.set]
    peer = str(ROOT / "benchmarks" / "ppo_step" / "trl_peer.py")
    if precision is None:
        return {"ours": ours}
    return {"ours": ours, "TRL": [options.peer_python, peer, str(folder), str(iterations), precision]}


def compare(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one piece of work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        tried, best = best_precision(work, options, folder) if has_peer(options.peer_python) else ({}, None)
        to_run = commands(options, folder, options.iterations + 1, best)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in to_run}
        rates = []
        for engine in alternating(list(to_run), options.pairs):
            if engine == "ours":
                rates.append(measure(work, torch.bfloat16))
                torch.cuda.empty_cache()  # the engines' own
            found[engine].append(run(to_run[engine], options.threads))
    middle = sorted(rates, key=lambda rate: rate.train)[len(rates) // 2]
    bounds = [bound(work, middle, i, weight_bytes=2) for i in range(1, options.iterations + 1)]
    return {
        "work": asdict(work),
        "peer_precision": best,
        "peer_precisions": tried,
        "runs": found,
        "rates": [asdict(rate) for rate in rates],
        "bound": {phase: statistics.median(each[phase] for each in bounds) for phase in ("rollout", "score", "update")},
    }


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Medians, least and greatest of each phase and engine, and the ratios between engines."""
    table: dict[str, Any] = {}
    for engine, runs in result["runs"].items():
        kept = [each for one in runs for each in one["iterations"][1:]]  # the first is warm-up
        for phase in PHASES:
            table[engine, phase] = spread([each[phase] for each in kept])
        sequences = result["work"]["rollouts"]
        table[engine, "samples/s"] = statistics.median(sequences / each["total"] for each in kept)
        table[engine, "tokens/s"] = statistics.median(each["tokens"] / each["total"] for each in kept)
        table[engine, "peak"] = statistics.median(one["peak_bytes"] for one in runs)
    return table


def markdown(results: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| work | phase | ours, s (least–greatest) | TRL, s (least–greatest) | times as fast | t*/t |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for result in results:
        table, stars = summary(result), dict(result["bound"])
        stars["total"] = sum(stars.values())
        for phase in PHASES:
            found = [table[engine, phase] for engine in result["runs"]]
            cells = [f"{a:.3f} ({b:.3f}–{c:.3f})" for a, b, c in found] + [""] * (2 - len(found))
            share = f"{stars[phase] / found[0][0]:.0%}"
            ratio = f"{found[1][0] / found[0][0]:.2f}" if len(found) > 1 else ""
            lines.append(f"| {result['work']['name']} | {phase} | {' | '.join(cells)} | {ratio} | {share} |")
        for key, name, unit, form, tail in COUNTS:
            found = [table[engine, key] / unit for engine in result["runs"]]
            cells = [f"{each:{form}}" for each in found] + [""] * (2 - len(found))
            ratio = f"{found[0] / found[1]:.2f}{tail}" if len(found) > 1 else ""
            lines.append(f"| | {name} | {' | '.join(cells)} | {ratio} | |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ppo_step", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peer" / "bin" / "python"), help="has trl 1.12.0")
    parser.add_argument("--works", nargs="+", default=["small-fixed", "small-natural"], choices=list(WORKS))
    parser.add_argument("--pairs", type=int, default=5, help="runs of each engine")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each run, behind one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override our configuration")
    parser.add_argument("--json", type=Path, help="write all raw figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [compare(WORKS[name], options) for name in options.works]
    print(markdown(results))
    rates = results[0]["rates"][0]
    gpu = torch.cuda.is_available()
    machine = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    print(
        f"\n{machine}, {options.threads} threads, torch {torch.__version__}; bf16 products "
        f"{rates['train'] / 1e9:.0f} GFLOP/s in training, {rates['decode'] / 1e9:.0f} in decoding, "
        f"{rates['bandwidth'] / 1e9:.0f} GB/s; TRL in {results[0]['peer_precision'] or 'no run'}"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
