"""Time one PPO iteration of this package against TRL 1.12.0's, each in a process of its own, from the same files.

    make bench                                                        # sets up TRL's environment, runs the small works
    python -m benchmarks.ppo_step --peer-python .venv-peer/bin/python --works small-fixed small-natural

Runs alternate (ours, TRL, TRL, ours, …), the first iteration of each is dropped as warm-up, and figures are medians
over all others with their least and greatest. TRL runs at the fastest of its precisions in which it trains: all are
tried first, and one in which most of the policy's weights are what they were after 32 optimizer steps does not count.
Beside the times stands t*, the bound of `bound.py`, measured between the runs. Only ratios are worth quoting: the
machine is the same for both, but seldom the same twice.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
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
# An engine trains if its steps reach the weights. In weights of bfloat16 steps of 3e-6 are rounded away.
LEAST_MOVED = 0.5


def commands(options: argparse.Namespace, folder: Path, iterations: int, precision: str) -> dict[str, list[str]]:
    ours = [sys.executable, "-m", "benchmarks.ppo_step.ours", str(folder), str(iterations), *options.set]
    peer = str(ROOT / "benchmarks" / "ppo_step" / "trl_peer.py")
    return {"ours": ours, "TRL": [options.peer_python, peer, str(folder), str(iterations), precision]}


def compare(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one piece of work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        tried = {name: run(commands(options, folder, 2, name)["TRL"], options.threads) for name in PEER_PRECISIONS}
        seconds = {name: min(each["total"] for each in one["iterations"]) for name, one in tried.items()}
        print(
            f"{work.name}: TRL's iteration "
            + ", ".join(f"{name} {seconds[name]:.2f} s ({tried[name]['moved']:.0%} moved)" for name in tried),
            flush=True,
        )
        best = min((name for name in tried if tried[name]["moved"] > LEAST_MOVED), key=seconds.get)
        to_run = commands(options, folder, options.iterations + 1, best)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in to_run}
        rates = []
        for engine in alternating(list(to_run), options.pairs):
            if engine == "ours":
                rates.append(measure(work, torch.bfloat16))
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
            ours, peer = table["ours", phase], table["TRL", phase]
            cells = [f"{a:.3f} ({b:.3f}–{c:.3f})" for a, b, c in (ours, peer)]
            share = f"{stars[phase] / ours[0]:.0%}"
            lines.append(
                f"| {result['work']['name']} | {phase} | {' | '.join(cells)} | {peer[0] / ours[0]:.2f} | {share} |"
            )
        rate, peak = ([table[engine, key] for engine in ("ours", "TRL")] for key in ("tokens/s", "peak"))
        lines.append(f"| | response tokens/s | {rate[0]:.0f} | {rate[1]:.0f} | {rate[0] / rate[1]:.2f} | |")
        mib = [each / 2**20 for each in peak]
        lines.append(f"| | peak memory, MiB | {mib[0]:.0f} | {mib[1]:.0f} | {mib[0] / mib[1]:.2f} of it | |")
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
    machine = platform.processor() or platform.machine()
    print(
        f"\n{machine}, {options.threads} threads, torch {torch.__version__}; bf16 products "
        f"{rates['train'] / 1e9:.0f} GFLOP/s in training, {rates['decode'] / 1e9:.0f} in decoding, "
        f"{rates['bandwidth'] / 1e9:.0f} GB/s; TRL in {results[0]['peer_precision']}"
    )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
