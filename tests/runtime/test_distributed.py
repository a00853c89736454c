"""Two processes do what one does: the same tokens, gradients, steps and files, and no one is left waiting."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from small_run import (
    ROOT,
    TORCHRUN,
    differences,
    finish,
    left_behind,
    records,
    signal_at,
    start,
    start_python,
    write_config,
    write_files,
)
from transformers import AutoModelForCausalLM

from chatrlhf.models.reward_model import load_reward_model


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> dict:
    """What `tests/ranks.py` finds in two processes."""
    found = tmp_path_factory.mktemp("ranks") / "found.pt"
    status, out, err = finish(start_python(*TORCHRUN, "2", str(ROOT / "tests" / "ranks.py"), str(found)))
    assert status == 0, err
    return torch.load(found)


def close(got, want, tolerance: float) -> None:
    """Equal up to a fraction of the largest entry."""
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp(min=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ranks.CASES)
def test_two_ranks_sample_estimate_and_learn_as_one_process(by_two, one_thread, case):
    got, want = by_two[case], ranks.ppo_steps(*ranks.CASES[case])
    exact = "bf16" not in ranks.CASES[case]
    for step in (0, 1) if exact else (0,):
        assert torch.equal(got[f"ids {step}"], want[f"ids {step}"])
        assert got[f"texts {step}"] == want[f"texts {step}"]
        close(got[f"advantages {step}"], want[f"advantages {step}"], 1e-4 if exact else 0.05)
        close(got[f"scores {step}"], want[f"scores {step}"], 1e-5)
        near = dict(rel=1e-3, abs=1e-5) if exact else dict(rel=2e-3, abs=2e-3)
        assert got[f"numbers {step}"] == pytest.approx(want[f"numbers {step}"], **near)
    start = ranks.actor_critic(ranks.CASES[case][0]).state_dict()
    for name, weight in want["weights"].items():
        moved, apart = weight - start[name], got["weights"][name] - weight
        if exact:
            assert apart.abs().max() <= 2e-4 * moved.abs().max(), name
        else:
            assert apart.norm() <= 0.1 * moved.norm(), name
    assert any(not torch.equal(weight, start[name]) for name, weight in want["weights"].items())


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """54 rows in batches of 8: the last batch of an epoch is split unevenly."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return write_config(folder, actor_config__epochs=2)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), ranks=2))
    assert status == 0, err
    return run_dir


def assert_close(ours: dict, theirs: dict) -> None:
    """Two lines of a log: equal texts, and numbers up to rounding that some steps have carried on."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        want = value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-6)
        assert ours[name] == want, (name, theirs)


@pytest.mark.slow
def test_all_three_stages_are_those_of_one_process(config, undisturbed, tmp_path):
    alone = tmp_path / "run"
    status, out, err = finish(start(str(config), "--output-dir", str(alone)))
    assert status == 0, err
    got, want = records(undisturbed, "metrics.jsonl"), records(alone, "metrics.jsonl")
    assert [row.keys() for row in got] == [row.keys() for row in want]
    for ours, theirs in zip(got, want, strict=True):
        assert_close(ours, theirs)
    for ours, theirs in zip(records(undisturbed, "samples.jsonl"), records(alone, "samples.jsonl"), strict=True):
        assert_close(ours, theirs)
    for folder in ("actor", "reward", "actor_rl", "critic"):
        first, second = (load_file(run / folder / "model.safetensors") for run in (undisturbed, alone))
        for name, weight in second.items():
            torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-5)
    AutoModelForCausalLM.from_pretrained(undisturbed / "actor_rl")
    assert load_reward_model(undisturbed / "reward").score(["hello"], ["well"])
    # The same files, but for the generators of each rank beside TRL's checkpoints.
    files = [
        {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "rng_state" not in path.name}
        for run in (undisturbed, alone)
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.nightly
def test_pairs_with_accumulation_and_a_last_batch_of_one_row(config, tmp_path):
    """56 rows in batches of 6 leave 2, then 55 leave 1: a rank has none of it. REWARD on pairs, RL by RLOO.

    Batches are of rows of similar length, of which each rank has to have every other one.
    """
    changes = [
        f"reward_config.train_dataset_path={config.parent / 'pairs.json'}",
        "actor_config.validation_fraction=0.08",
        "reward_config.validation_fraction=0.08",
        *(
            f"{section}.{key}"
            for section in ("actor_config", "reward_config")
            for key in ("batch_size=6", "epochs=2", "sort_by_length=True")
        ),
        "actor_config.micro_batch_size=3",
        "reward_config.micro_batch_size=1",
        "reward_config.lr=1e-3",  # at the usual one the loss ends near 0, where rounding is much of the gradient
        "trainer_config.algorithm=rloo",
        "trainer_config.samples_per_prompt=4",
        "trainer_config.num_layers_unfrozen=1",
    ]
    words = [word for change in changes for word in ("--set", change)]
    for number in (1, 2):
        process = start(str(config), "--output-dir", str(tmp_path / str(number)), *words, ranks=number)
        status, out, err = finish(process)
        assert status == 0, err
        assert "55 rows" in out
    one, two = (records(tmp_path / name, "metrics.jsonl") for name in "12")
    # TRL's accuracies are means over microbatches, of which one process has others.
    for row in (*one, *two):
        row.pop("token_accuracy", None), row.pop("reward/accuracy_train", None)
    for ours, theirs in zip(two, one, strict=True):
        assert_close(ours, theirs)


AT_UPDATE = ("rl.optimizer_step", 14)
AT_LOG = ("trainer.log", 12)


def resume_and_compare(config: Path, run_dir: Path, undisturbed: Path) -> None:
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--resume", ranks=2))
    assert status == 0, err
    assert differences(left_behind(run_dir), left_behind(undisturbed)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "place, stage", [pytest.param(AT_LOG, "ACTOR", marks=pytest.mark.nightly), (AT_UPDATE, "RL")], ids=["ACTOR", "RL"]
)
def test_a_signal_to_one_rank_stops_both_behind_a_checkpoint(config, undisturbed, tmp_path, place, stage):
    run_dir = tmp_path / "run"
    code = signal_at(place[0], signal.SIGTERM, place[1], rank=1)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), code=code, ranks=2))
    assert status != 0
    assert err.count("continue with --resume") == 1
    assert list((run_dir / "checkpoints" / stage).glob("step-*"))
    resume_and_compare(config, run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("place", [pytest.param(AT_LOG, marks=pytest.mark.nightly), AT_UPDATE], ids=["ACTOR", "RL"])
def test_what_two_ranks_began_one_process_can_finish(config, undisturbed, tmp_path, place):
    run_dir = tmp_path / "run"
    code = signal_at(place[0], signal.SIGTERM, place[1], rank=1)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), code=code, ranks=2))
    assert status != 0
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), "--resume"))
    assert status == 0, err
    for ours, theirs in zip(records(run_dir, "metrics.jsonl"), records(undisturbed, "metrics.jsonl"), strict=True):
        assert_close(ours, theirs)


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_all(config, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    process = start(str(config), "--output-dir", str(run_dir), ranks=2)
    deadline = time.monotonic() + 120
    while not list(run_dir.glob("checkpoints/ACTOR/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    status, out, err = finish(process)
    assert status != 0
    assert err.count("continue with --resume") == 1
    resume_and_compare(config, run_dir, undisturbed)


@pytest.mark.slow
def test_a_rank_that_is_killed_leaves_nobody_waiting(config, undisturbed, tmp_path):
    run_dir = tmp_path / "run"
    code = signal_at(AT_UPDATE[0], signal.SIGKILL, AT_UPDATE[1], rank=1)
    status, out, err = finish(start(str(config), "--output-dir", str(run_dir), code=code, ranks=2), timeout=120)
    assert status != 0
    resume_and_compare(config, run_dir, undisturbed)


REWARD = """
import os
calls = 0
def score(prompts, completions):
    global calls
    calls += 1
    assert len(prompts) <= 4, "the rows of one rank"
    if os.environ["RANK"] == "1" and calls == 3:
        return [0.5] * (len(completions) - 1)
    return [float(len(each)) for each in completions]
"""


@pytest.mark.slow
def test_a_reward_error_of_one_rank_ends_both_with_one_message(config, tmp_path):
    (tmp_path / "rewards_of_a_rank.py").write_text(REWARD)
    code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})"
    words = ["--type", "RL", "--set", "reward_config.reward_fn=rewards_of_a_rank:score"]
    process = start(str(config), "--output-dir", str(tmp_path / "run"), *words, code=code, ranks=2)
    status, out, err = finish(process, timeout=120)
    assert status != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "rewards_of_a_rank:score: returned 3 scores for 4 completions; return one each" in lines[0]


@pytest.mark.slow
def test_what_the_configuration_gets_wrong_is_said_once(config, tmp_path):
    words = [str(config), "--output-dir", str(tmp_path / "run"), "--set", "reward_config.batch_size=7"]
    status, out, err = finish(start(*words, ranks=2))
    assert status != 0
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "reward_config.batch_size: 7 is not divisible by the 2 processes" in lines[0]
    assert not (tmp_path / "run").exists()
