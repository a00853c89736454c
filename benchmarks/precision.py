"""Whether RL in bfloat16 (working copy, float32 masters) learns what RL in float32 learns: the same tasks, five seeds.

    python -m benchmarks.precision --default runs/default      # some ten minutes

Random walks train from one fine-tuned model; the embedded default's RL stage from the actor and the reward model that
`make run` has left in the given folder. Printed are the rewards of each seed, their means, and the difference with
its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from benchmarks.random_walks import FIRST_GRAPH, draw_task, run

ROOT = Path(__file__).parents[1]
PRECISIONS = ("fp32", "bf16")


def walks(seeds: int, graph: int) -> dict[str, list[float]]:
    """Optimality after training, by precision."""
    task = draw_task(graph)
    return {name: [run(task, seed, precision=name) for seed in range(seeds)] for name in PRECISIONS}


def default(seeds: int, trained: Path) -> dict[str, list[float]]:
    """The true score of held-out prompts after the embedded default's RL stage, by precision."""
    found: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    for seed in range(1, seeds + 1):
        for name in PRECISIONS:
            with tempfile.TemporaryDirectory() as folder:
                for part in ("actor", "reward", "manifest.json"):
                    copy = shutil.copytree if (trained / part).is_dir() else shutil.copy
                    copy(trained / part, Path(folder) / part)
                command = [sys.executable, "main.py", "config.yaml", "--type", "RL", "--output-dir", folder]
                command += ["--set", f"seed={seed}", "--set", f"trainer_config.precision={name}"]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode != 0:
                    raise SystemExit(done.stderr[-2000:])
                lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
                found[name].append([line["eval/true_score"] for line in lines if "eval/true_score" in line][-1])
    return found


def report(task: str, found: dict[str, list[float]]) -> None:
    for name, scores in found.items():
        print(f"{task} {name}: mean {statistics.fmean(scores):.3f} of", " ".join(f"{score:.3f}" for score in scores))
    differences = [b - a for a, b in zip(found["fp32"], found["bf16"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    print(f"{task}: bf16 - fp32 = {statistics.fmean(differences):+.3f} +- {error:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--graph", type=int, default=FIRST_GRAPH)
    parser.add_argument("--default", type=Path, help="folder of a finished run of config.yaml; without: walks alone")
    parser.add_argument("--skip-walks", action="store_true", help="the embedded default alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    began = time.perf_counter()
    if not options.skip_walks:
        report("random walks", walks(options.seeds, options.graph))
    if options.default is not None:
        report("embedded default", default(options.seeds, options.default))
    print(f"{time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
