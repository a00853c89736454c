"""Each guard rung by a run that was made to fail that way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import length, records, settings, write_files

from chatrlhf.config import load_config
from chatrlhf.errors import DivergedError, NotTrainedError, RewardError
from chatrlhf.pipeline import run
from chatrlhf.runtime import fault_points


def configured(folder: Path, name: str = "run", **changes: Any) -> Any:
    if not (folder / "actor.json").exists():
        write_files(folder)
    tree = settings(folder) | {"output_dir": str(folder / name)}
    return load_config(tree, {key.replace("__", "."): value for key, value in changes.items()})


def at(place: str, action: Callable[..., None], calls: set[int]) -> Callable[[], None]:
    """Have an action called at some calls of a place, from 1."""
    count = [0]

    def counted(*facts: Any) -> None:
        count[0] += 1
        if count[0] in calls:
            action(*facts)

    return fault_points.at(place, counted)


def spoil(model: torch.nn.Module) -> None:
    """A NaN in one gradient."""
    weight = next(each for each in model.parameters() if each.grad is not None)
    weight.grad.view(-1)[0] = torch.nan


def rows(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["stage"] == stage]


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


@pytest.mark.parametrize("stage", ["ACTOR", "REWARD"])
def test_a_gradient_that_is_not_finite_is_not_stepped_with(tmp_path, stage, capsys):
    section = f"{stage.lower()}_config"
    keys = {f"{section}__checkpoint_steps": 1, f"{section}__n_checkpoints_to_keep": 9}
    config = configured(tmp_path, **keys)
    end = at("trainer.gradients", spoil, {4})
    try:
        run(config, type=stage)
    finally:
        end()
    checkpoints = config.run_dir / "checkpoints" / stage
    before, skipped, behind = (checkpoints / f"step-{step:06d}" for step in (3, 4, 5))
    for name in ("optimizer.pt", "scheduler.pt"):
        assert (before / name).read_bytes() == (skipped / name).read_bytes() != (behind / name).read_bytes()
    assert weights(before) == weights(skipped) != weights(behind)
    assert "the step is not taken (1 in a row, 3 end the run)" in capsys.readouterr().out
    kept = json.loads((checkpoints / "skipped" / "step-000004.json").read_text())
    assert len(kept["rows"]) == 8 and "gradient" in kept["where"] and all(row["text"] for row in kept["rows"])
    (logged,) = [each for each in rows(config.run_dir, stage) if each["step"] == 4 and "guard/skipped_steps" in each]
    assert logged["guard/skipped_steps"] == 1 and "loss/train" not in logged


def test_a_skipped_step_is_the_same_step_in_a_resumed_run(tmp_path):
    """Killed behind it, and resumed: the schedule, the order of rows and the count are those of a run in one piece."""
    keys = {"actor_config__checkpoint_steps": 1}
    whole, resumed = configured(tmp_path, "whole", **keys), configured(tmp_path, "resumed", **keys)
    end = at("trainer.gradients", spoil, {2, 3})
    try:
        run(whole, type="ACTOR")
    finally:
        end()

    class Killed(Exception):
        pass

    def die(step: int) -> None:
        if step == 4:
            raise Killed

    ends = [at("trainer.gradients", spoil, {2, 3}), fault_points.at("trainer.step", die)]
    try:
        with pytest.raises(Killed):
            run(resumed, type="ACTOR")
    finally:
        for end in ends:
            end()
    run(resumed, type="ACTOR", resume=True)
    newest = [config.run_dir / "checkpoints" / "ACTOR" / "step-000007" for config in (whole, resumed)]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "order.json"):
        assert (newest[0] / name).read_bytes() == (newest[1] / name).read_bytes(), name
    assert records(whole.run_dir, "metrics.jsonl") == records(resumed.run_dir, "metrics.jsonl")


def test_several_in_a_row_end_a_stage_and_nothing_is_published(tmp_path):
    config = configured(tmp_path)
    end = fault_points.at("trainer.gradients", spoil)
    try:
        with pytest.raises(
            DivergedError, match=r"ACTOR step 3: gradient nan .*rows \d+.*3 steps in a row.*actor_config.lr"
        ):
            run(config, type="ACTOR")
    finally:
        end()
    assert not (config.run_dir / "actor").exists()
    assert not list((config.run_dir / "checkpoints" / "ACTOR").glob("step-*"))


def test_a_learning_rate_that_is_far_too_high_ends_the_run(tmp_path):
    """Weights of 1e38: losses overflow, no step is taken, and RL never starts."""
    keys = {"actor_config__lr_scheduler": "constant", "actor_config__warmup_steps": 0, "actor_config__epochs": 4}
    config = configured(tmp_path, actor_config__lr=1.0, guards_config__allow_untrained_actor=False, **keys)
    with pytest.raises((DivergedError, NotTrainedError)) as error:
        run(config)
    assert "actor_config.lr" in str(error.value)
    assert not (config.run_dir / "actor_rl").exists() and not (config.run_dir / "reward").exists()


def test_an_actor_that_has_learned_nothing_stops_before_the_next_stage(tmp_path):
    config = configured(tmp_path, actor_config__lr=0.0, guards_config__allow_untrained_actor=False)
    with pytest.raises(NotTrainedError, match="RL does not start: .*guards_config.allow_untrained_actor"):
        run(config)
    assert (config.run_dir / "actor").exists() and not (config.run_dir / "reward").exists()
    with pytest.raises(NotTrainedError, match="RL does not start"):
        run(config, type="RL", reward_fn=length)


def test_rl_does_not_follow_a_coin_where_that_is_asked_for(tmp_path, capsys):
    """Scores that say nothing: a reward model cannot learn from them."""
    write_files(tmp_path)
    noise = [
        row | {"score": float(hash(row["user_input"]) % 7)}
        for row in json.loads((tmp_path / "reward.json").read_text())
    ]
    (tmp_path / "reward.json").write_text(json.dumps(noise))
    config = configured(tmp_path, reward_config__lr=0.0, guards_config__stop_at_coin_flip=True)
    with pytest.raises(NotTrainedError, match="95 % interval .* which a coin may do. Give it more rows"):
        run(config)
    assert "RL would follow noise" in capsys.readouterr().out
    assert (config.run_dir / "reward").exists() and not (config.run_dir / "actor_rl").exists()


def test_an_update_that_is_not_finite_leaves_kl_and_weights(tmp_path, capsys):
    keys = {"trainer_config__checkpoint_steps": 1, "trainer_config__n_checkpoints_to_keep": 9}
    config = configured(tmp_path, **keys)
    calls = set(range(5, 9))  # all four minibatches of the second step

    def spoil_all(model: torch.nn.Module) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                weight.grad.fill_(torch.nan)

    end = at("rl.gradients", spoil_all, calls)
    try:
        run(config, type="RL", reward_fn=length)
    finally:
        end()
    folder = config.run_dir / "checkpoints" / "RL"
    first, second, third = (folder / f"step-{step:06d}" for step in (1, 2, 3))
    assert weights(first) == weights(second) != weights(third)
    states = [torch.load(step / "training.pt", weights_only=True) for step in (first, second)]
    assert str(states[0]["optimizer"]) == str(states[1]["optimizer"])
    assert states[0]["scheduler"] == states[1]["scheduler"]
    kl = [json.loads((step / "state.json").read_text())["kl"] for step in (first, second, third)]
    assert kl[0] == kl[1] != kl[2]
    assert [row["guard/skipped_minibatches"] for row in rows(config.run_dir, "RL") if row["step"]] == [0, 4, 0, 0, 0, 0]
    kept = json.loads((folder / "skipped" / "step-000002.json").read_text())
    assert [row["row"] for row in kept["rows"]] == list(range(1, 9))
    assert "the step is not taken (1 in a row, 3 end the run)" in capsys.readouterr().out


def test_a_reward_that_is_no_number_now_and_then_costs_a_step_and_always_the_run(tmp_path):
    asked = [0]

    def sometimes(prompts: list[str], completions: list[str]) -> list[float]:
        asked[0] += 1
        scores = length(prompts, completions)
        return [float("nan"), *scores[1:]] if asked[0] == 4 else scores  # 1: the trial, 2: the held-out prompts

    config = configured(tmp_path)
    run(config, type="RL", reward_fn=sometimes)
    assert [row["step"] for row in rows(config.run_dir, "RL") if "reward/mean" in row] == [1, 3, 4, 5, 6]

    def from_then_on(prompts: list[str], completions: list[str]) -> list[float]:
        asked[0] += 1
        return [float("nan") if asked[0] > 4 else 1.0 for _ in completions]

    asked[0] = 0
    config = configured(tmp_path, "always")
    with pytest.raises(RewardError, match="score 0 is nan"):
        run(config, type="RL", reward_fn=from_then_on)
    assert sorted(path.name for path in (config.run_dir / "checkpoints" / "RL" / "skipped").iterdir()) == [
        "step-000003.json",
        "step-000004.json",
        "step-000005.json",
    ]
