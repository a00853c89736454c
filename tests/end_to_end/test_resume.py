"""A run that was killed and resumed ends with the bytes of a run that was not."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import differences, finish, left_behind, read_manifest, signal_at, start, write_config, write_files

KILL = signal.SIGKILL
# The process dies there, as if the power had gone.
KILLS = {
    "during a rollout": signal_at("rollout.draw", KILL, 30),
    "before the first RL checkpoint": signal_at("rl.optimizer_step", KILL, 3),
    "inside a PPO epoch": signal_at("rl.optimizer_step", KILL, 15),
    "while an RL checkpoint is written": """
import os, signal
from chatrlhf.runtime import fault_points
def half(folder):
    open(folder / "model.safetensors", "r+b").truncate(100)
    os.kill(os.getpid(), signal.SIGKILL)
fault_points.at("rl.weights_saved", half, 2)
""",
    "while an SFT checkpoint is published": signal_at("trainer.publish", KILL, 12),
    "between training a reward model and its publication": signal_at("reward_model.head", KILL, 1),
    "between the two renames that replace a result": """
import os, signal
from chatrlhf.runtime import fault_points
def die(target):
    if target.name == "actor_rl":
        os.kill(os.getpid(), signal.SIGKILL)
fault_points.at("publish.between_renames", die)
""",
}

# The other places are killed at nightly.
IN_CI = ("during a rollout", "while an RL checkpoint is written", "while an SFT checkpoint is published")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return write_config(folder)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir)))
    assert status == 0, err
    return run_dir


def resume_and_compare(config: Path, run_dir: Path, undisturbed: Path) -> None:
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--resume"))
    assert status == 0, err
    assert differences(left_behind(run_dir), left_behind(undisturbed)) == []


def killed(config: Path, run_dir: Path, place: str) -> None:
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), code=KILLS[place]))
    assert status == -signal.SIGKILL, f"the run was meant to die {place}: {err}"


def test_killed_inside_a_ppo_epoch(config, undisturbed, tmp_path):
    killed(config, tmp_path / "run", "inside a PPO epoch")
    resume_and_compare(config, tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_one_stage_at_a_time_leaves_what_all_leaves(config, undisturbed, tmp_path):
    """But for what RL says of the demonstrations that ACTOR reads: by itself it does not read them."""
    run_dir = tmp_path / "run"
    for stage in ("ACTOR", "REWARD", "RL"):
        status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--type", stage))
        assert status == 0, err
    apart, together = (without_demonstrations(left_behind(each)) for each in (run_dir, undisturbed))
    assert differences(apart, together) == []


def reopen(run_dir: Path, *stages: str) -> None:
    """Have a manifest take finished stages for ones that are not."""
    stored = read_manifest(run_dir)
    for stage in stages:
        stored["stages"][stage]["status"] = "open"
    (run_dir / "manifest.json").write_text(json.dumps(stored))


def without_demonstrations(left: Any) -> Any:
    if isinstance(left, list):
        return [without_demonstrations(each) for each in left]
    if not isinstance(left, dict):
        return left
    return {
        name: without_demonstrations(value)
        for name, value in left.items()
        if not name.endswith(("demonstration_loss", "forgotten"))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "place", [place if place in IN_CI else pytest.param(place, marks=pytest.mark.nightly) for place in KILLS]
)
def test_killed_at_a_chosen_place(config, undisturbed, tmp_path, place):
    killed(config, tmp_path / "run", place)
    resume_and_compare(config, tmp_path / "run", undisturbed)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_ten_random_moments(config, undisturbed, tmp_path):
    """One run, killed ten times on its way through all three stages."""
    run_dir, rng = tmp_path / "run", random.Random(0)
    kills = 0
    # A run takes about 10 s, of which half is start-up; resumed ones get further each time.
    while kills < 10:
        words = ["--resume"] if (run_dir / "manifest.json").exists() else []
        process = start(str(config), "--output-dir", str(run_dir), *words)
        deadline = time.monotonic() + rng.uniform(3, 12)
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            assert process.returncode == 0, finish(process)[2]
            assert differences(left_behind(run_dir), left_behind(undisturbed)) == []
            shutil.rmtree(run_dir)  # it got through: the next round starts afresh
            continue
        process.kill()
        process.communicate()
        kills += 1
    words = ["--resume"] if (run_dir / "manifest.json").exists() else []
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), *words))
    assert status == 0, err
    assert differences(left_behind(run_dir), left_behind(undisturbed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("stage", ["ACTOR", "RL"])
def test_a_signal_leaves_a_valid_checkpoint(config, undisturbed, tmp_path, number, stage):
    run_dir = tmp_path / "run"
    code = signal_at("trainer.log" if stage == "ACTOR" else "rl.optimizer_step", number, 6)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), code=code))
    assert status == 128 + number
    assert "continue with --resume" in err
    assert list((run_dir / "checkpoints" / stage).glob("step-*"))
    resume_and_compare(config, run_dir, undisturbed)


@pytest.mark.slow
def test_a_truncated_checkpoint_falls_back_and_none_valid_is_an_error(config, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "actor_rl")
    reopen(run_dir, "RL")
    older, newest = sorted((run_dir / "checkpoints" / "RL").glob("step-*"))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--type", "RL", "--resume"))
    assert status == 0, err
    assert f"checkpoint {newest} is damaged" in out and f"resumed from {older}" in out
    alone, together = (without_demonstrations(left_behind(each)) for each in (run_dir, undisturbed))
    assert differences(alone, together) == []

    reopen(run_dir, "RL")
    for folder in (run_dir / "checkpoints" / "RL").glob("step-*"):
        (folder / "training.pt").write_bytes(b"")
    before = left_behind(run_dir)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--type", "RL", "--resume"))
    assert status == 2
    assert err.startswith("error: ") and "none of its 2 checkpoints is valid" in err
    assert differences(left_behind(run_dir), before) == []


def test_a_checkpoint_of_another_model_is_refused(config, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    reopen(run_dir, "ACTOR", "REWARD", "RL")
    wider = "actor_config.tiny.hidden_size=48"
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--resume", "--set", wider))
    assert status == 2
    assert "actor_config.tiny.hidden_size: 32 -> 48 cannot change, ACTOR was begun with it" in err
    assert err.count("\n") == 1


def test_resume_where_nothing_ran_is_an_error(config, tmp_path):
    status, out, err = finish(start(str(config), "--output-dir", str(tmp_path / "nothing"), "--resume"))
    assert status == 2 and "no run in" in err
    assert not (tmp_path / "nothing").exists()


def test_a_second_run_without_resume_sets_the_first_aside(config, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--type", "ACTOR"))
    assert status == 0, err
    kept = run_dir / "previous" / "ACTOR-1"
    assert (kept / "actor" / "model.safetensors").read_bytes() == (undisturbed / "actor/model.safetensors").read_bytes()
    assert (kept / "metrics.jsonl").read_text() == (undisturbed / "metrics.jsonl").read_text()
