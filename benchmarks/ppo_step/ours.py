"""This package on a piece of work, as `--type RL` runs it: configuration in, `metrics.jsonl` out.

python -m benchmarks.ppo_step.ours FOLDER ITERATIONS [key=value …]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import chatrlhf.pipeline  # first: what it asks of PyTorch's threads is read when they are loaded

os.environ["HF_HUB_OFFLINE"] = "1"

import accelerate  # noqa: E402, F401
import datasets  # noqa: E402, F401
import peft  # noqa: E402, F401
import torch  # noqa: E402
import transformers  # noqa: E402, F401
from safetensors.torch import load_file  # noqa: E402

from benchmarks.ppo_step.work import Work, moved, read_work, report, rss  # noqa: E402
from chatrlhf.config import load_config  # noqa: E402
from chatrlhf.rollout.context import Limits

PHASES = ("rollout", "score", "update")


def settings(work: Work, folder: Path, iterations: int) -> dict:
    """The configuration a user would write for this work."""
    return {
        "seed": 0,
        "actor_config": {
            "model": str(folder / "policy"),
            "template": "raw",
            "max_sequence_length": work.prompt + work.response,
        },
        "reward_config": {"model": str(folder / "reward")},
        "trainer_config": {
            "examples_path": str(folder / "prompts.json"),
            "validation_fraction": 0.0,
            "total_episodes": iterations * work.rollouts,
            "num_rollouts": work.rollouts,
            "batch_size": work.minibatch,
            "micro_batch_size": work.backward,
            "ppo_epochs": work.epochs,
            "actor_lr": 3e-6,
            "critic_lr": 3e-6,
            "gen_kwargs": {"max_new_tokens": work.response, "min_new_tokens": work.response, "temperature": 1.0},
        },
    }


def replay_lengths(work: Work) -> None:
    """End each row at its given length instead of the common one."""
    calls = [0]

    def per_row(limits: Limits, prompt_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor(work.lengths(calls[0]))
        calls[0] += 1
        return lengths, lengths

    Limits.per_row = per_row


def main(folder: Path, iterations: int, overrides: list[str]) -> None:
    after_imports = rss()
    work = read_work(folder)
    if work.natural:
        replay_lengths(work)
    with tempfile.TemporaryDirectory() as out:
        config = load_config(settings(work, folder, iterations) | {"output_dir": out}, overrides)
        stdout, sys.stdout = sys.stdout, sys.stderr
        result = chatrlhf.pipeline.run(config, type="RL")
        sys.stdout = stdout
        changed = moved(load_file(Path(out) / "actor_rl" / "model.safetensors"), folder)
        lines = [json.loads(line) for line in result.stages["RL"].metrics.path.read_text().splitlines()]
    found = []
    for i, line in enumerate(line for line in lines if "time/rollout" in line):
        phases = {phase: line[f"time/{phase}"] for phase in PHASES}
        found.append(phases | {"total": sum(phases.values()), "tokens": sum(work.lengths(i))})
    report(found, after_imports, changed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
