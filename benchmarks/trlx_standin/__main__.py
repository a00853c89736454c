"""Time one PPO iteration of this package against the stand-in for trlX, at trlX's actor-critic.

    python -m benchmarks.trlx_standin --peer-python .venv-peer/bin/python

The actor-critic is a value head of two layers on the policy's trunk, a full copy as reference, all layers trained, and
a reward that is a function of the text. This package runs as `--type RL` runs it, in its own precision; the stand-in in
float32, as trlX does.

Whether the stand-in stands for trlX is checked in the same run, by TRL: what trlX 0.7.0 itself took for rollouts
(generation and scoring) and for the update is known as a share of TRL 1.12.0's total, on the work `small-fixed`. Those
shares are one machine's. Where TRL's total has other parts, trlX's own shares are others, too: on one core of a Xeon
with AMX trlX 0.7.0 itself (torch 2.13, transformers 4.32.1, chunks of 16) took 3.4 s for rollouts and 6.6 for the
update, the stand-in 2.9 and 6.3, and TRL 16.3 in all, so that neither can come near the shares below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.ppo_step.work import WORKS, Work, prepare
from benchmarks.processes import ROOT, alternating, cell, run

PHASES = ("rollout", "score", "update", "total")
# trlX 0.7.0's seconds in TRL 1.12.0's total: 5.4 and 8.5–9 of 10.1–10.5.
SHARES, TOLERANCE = {"rollouts": 0.52, "update": 0.85}, 0.15
CALIBRATED_ON = "small-fixed"


def overrides(work: Work) -> list[str]:
    """This package's configuration at trlX's actor-critic."""
    return [
        "critic_config.model=shared",
        f"critic_config.model_head_hidden_size={2 * work.hidden}",
        "reward_config.model=null",
        "reward_config.reward_fn=benchmarks.trlx_standin.reward:even_words",
    ]


def commands(work: Work, folder: Path, options: argparse.Namespace, iterations: int) -> dict[str, list[str]]:
    """What starts each engine on the work in ``folder``."""
    common, module = [str(folder), str(iterations)], [sys.executable, "-m"]
    return {
        "ours": [*module, "benchmarks.ppo_step.ours", *common, *overrides(work), *options.set],
        "stand-in": [*module, "benchmarks.trlx_standin.engine", *common, str(options.chunk_size)],
    }


def peer_command(folder: Path, options: argparse.Namespace, iterations: int, precision: str) -> list[str]:
    script = str(ROOT / "benchmarks" / "ppo_step" / "trl_peer.py")
    return [options.peer_python, script, str(folder), str(iterations), precision]


def best_precision(folder: Path, options: argparse.Namespace) -> str:
    """The one that TRL is fastest at, by its faster iteration of two."""
    totals = {}
    for precision in options.peer_precisions:
        found = run(peer_command(folder, options, 2, precision), options.threads)
        totals[precision] = min(each["total"] for each in found["iterations"])
    print("TRL's iteration: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in totals.items()), flush=True)
    return min(totals, key=totals.get)


def compare(work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one piece of work; TRL's too where the stand-in is checked."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        to_run, precision = commands(work, folder, options, options.iterations + 1), None
        if options.calibrate and work.name == CALIBRATED_ON:
            precision = best_precision(folder, options)
            to_run["TRL"] = peer_command(folder, options, options.iterations + 1, precision)
        found: dict[str, list[dict[str, Any]]] = {engine: [] for engine in to_run}
        for engine in alternating(list(to_run), options.pairs):
            found[engine].append(run(to_run[engine], options.threads))
    return {"work": asdict(work), "peer_precision": precision, "runs": found}


def kept(result: dict[str, Any], engine: str) -> list[dict[str, float]]:
    """Iterations of all runs; the first of each is warm-up."""
    return [each for one in result["runs"][engine] for each in one["iterations"][1:]]


def calibration(result: dict[str, Any]) -> dict[str, float]:
    """The stand-in's rollouts (generation and scoring) and update as shares of TRL's total, by their medians."""
    total = statistics.median(each["total"] for each in kept(result, "TRL"))
    stand_in = kept(result, "stand-in")
    return {
        "rollouts": statistics.median(each["rollout"] + each["score"] for each in stand_in) / total,
        "update": statistics.median(each["update"] for each in stand_in) / total,
    }


def calibration_line(result: dict[str, Any]) -> str:
    parts = []
    for phase, share in calibration(result).items():
        off = share / SHARES[phase] - 1
        verdict = "within" if abs(off) <= TOLERANCE else "NOT within"
        parts.append(f"{phase} {share:.2f} (trlX {SHARES[phase]}, {off:+.0%}, {verdict} {TOLERANCE:.0%})")
    total = cell([each["total"] for each in kept(result, "TRL")])
    return f"Calibration, by TRL's total of {total} s in {result['peer_precision']}: " + "; ".join(parts)


def markdown(results: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| work | phase | ours, s (least–greatest) | stand-in, s (least–greatest) | times as fast |",
        "|---|---|---:|---:|---:|",
    ]
    for result in results:
        ours, other = kept(result, "ours"), kept(result, "stand-in")
        for phase in PHASES:
            mine, its = ([each[phase] for each in engine] for engine in (ours, other))
            ratio = statistics.median(its) / statistics.median(mine)
            lines.append(f"| {result['work']['name']} | {phase} | {cell(mine)} | {cell(its)} | {ratio:.2f} |")
        peaks = [
            statistics.median(one["peak_bytes"] for one in result["runs"][engine]) / 2**20
            for engine in ("ours", "stand-in")
        ]
        lines.append(f"| | peak memory, MiB | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[0] / peaks[1]:.2f} of it |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trlx_standin", description=__doc__.split("\n")[0])
    parser.add_argument("--peer-python", default=str(ROOT / ".venv-peer" / "bin" / "python"), help="has trl 1.12.0")
    parser.add_argument("--peer-precisions", nargs="+", default=["fp32", "bf16"], help="TRL runs at the best of them")
    parser.add_argument("--works", nargs="+", default=["small-fixed", "small-natural"], choices=list(WORKS))
    parser.add_argument("--pairs", type=int, default=5, help="runs of each engine")
    parser.add_argument("--iterations", type=int, default=3, help="measured in each run, behind one of warm-up")
    parser.add_argument("--chunk-size", type=int, default=16, help="rows the stand-in generates side by side")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override our configuration")
    parser.add_argument("--no-calibrate", dest="calibrate", action="store_false", help="leave TRL out")
    parser.add_argument("--json", type=Path, help="write all raw figures there")
    options = parser.parse_args()
    results = [compare(WORKS[name], options) for name in options.works]
    print(markdown(results))
    for result in results:
        if "TRL" in result["runs"]:
            print("\n" + calibration_line(result))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
