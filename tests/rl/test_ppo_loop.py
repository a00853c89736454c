"""The loop of RL: which steps are evaluated and saved, what is counted, and where a signal stops it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from resuming import configured, write_case
from small_run import length

from chatrlhf import run
from chatrlhf.errors import Interrupted
from chatrlhf.runtime import fault_points

STEPS = 5


@pytest.fixture
def tree(tmp_path) -> dict[str, Any]:
    """Five steps of 8 rollouts, two of each prompt."""
    (tmp_path / "held.json").write_text(json.dumps([{"user_input": f"say {i}"} for i in range(4)]))
    made = write_case(tmp_path) | {"reward_config": {}}
    keys = {"total_episodes": 8 * STEPS, "samples_per_prompt": 2, "checkpoint_steps": 2, "eval_interval": 3}
    made["trainer_config"] |= keys | {"validation_examples_path": str(tmp_path / "held.json")}
    return made


def rows(tree: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (Path(tree["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoints(tree: dict[str, Any]) -> list[int]:
    folders = (Path(tree["output_dir"]) / "checkpoints" / "RL").glob("step-*")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def signalled_at(step: int):
    """A SIGTERM in the step of this number."""
    return fault_points.at("rl.step", lambda number: number == step and os.kill(os.getpid(), signal.SIGTERM))


def test_it_judges_and_saves_at_its_intervals_and_at_the_end(tree):
    run(configured(tree, trainer_config__n_checkpoints_to_keep=9), type="RL", reward_fn=length)
    logged = rows(tree)
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5]
    assert [row["step"] for row in logged if "eval/kl" in row] == [0, 3, 5]
    assert [row["episodes"] for row in logged[1:]] == [8, 16, 24, 32, 40]
    assert checkpoints(tree) == [2, 4, 5]
    samples = (Path(tree["output_dir"]) / "samples.jsonl").read_text().splitlines()
    assert len(samples) == 2 * STEPS


def test_a_signal_saves_at_once_and_a_resumed_run_does_the_rest(tree):
    end = signalled_at(3)
    with pytest.raises(Interrupted, match="step-000003"):
        run(configured(tree), type="RL", reward_fn=length)
    end()
    assert checkpoints(tree)[-1] == 3
    state = json.loads((Path(tree["output_dir"]) / "checkpoints" / "RL" / "step-000003" / "state.json").read_text())
    # Two epochs over minibatches of 4 of 8 rollouts, which are of four prompts.
    assert state["step"] == 3 and state["progress"] == {
        "steps": 3,
        "episodes": 24,
        "prompts": 12,
        "optimizer_steps": 12,
    }
    run(configured(tree), type="RL", reward_fn=length, resume=True)
    assert [row["step"] for row in rows(tree)] == [0, 1, 2, 3, 4, 5] and checkpoints(tree)[-1] == 5


def test_a_signal_in_the_last_step_ends_a_run_that_is_whole(tree):
    end = signalled_at(STEPS)
    run(configured(tree), type="RL", reward_fn=length)
    end()
    assert (Path(tree["output_dir"]) / "actor_rl" / "config.json").exists() and checkpoints(tree)[-1] == STEPS
