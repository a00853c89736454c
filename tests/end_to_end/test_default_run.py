"""The embedded default keeps its promises: by a rule that training never saw, RL makes replies better, on a leash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_run import ROOT, finish, start

from chatrlhf.samples.visitor_desk import BEST_SCORE, CRITERIA

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

CONFIG = str(ROOT / "config.yaml")


# A third of the training: what CI has time for.
IN_SHORT = ("actor_config.epochs=1", "reward_config.epochs=1", "trainer_config.total_episodes=640")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("default") / "run"
    status, out, err = finish(start(CONFIG, "--output-dir", str(run_dir), "--type", "ALL"), 1400)
    assert status == 0, err
    return run_dir


def before_and_after(run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation on the held-out prompts."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [row for row in rows if row["stage"] == "RL" and "eval/true_score" in row]
    assert before["step"] == 0
    return before, after


def test_a_third_of_it_has_learned_most_of_it(tmp_path):
    words = [word for each in IN_SHORT for word in ("--set", each)]
    status, out, err = finish(start(CONFIG, "--output-dir", str(tmp_path / "run"), "--type", "ALL", *words), 1400)
    assert status == 0, err
    assert "RL closed 0." in out and "side by side" in out
    before, after = before_and_after(tmp_path / "run")
    assert after["eval/true_score"] - before["eval/true_score"] >= 0.4 * (BEST_SCORE - before["eval/true_score"])
    assert after["eval/reward"] > before["eval/reward"] + 1.0 and after["eval/kl_k1"] <= 8.0


@pytest.mark.nightly
def test_rl_closes_most_of_the_gap_without_losing_a_criterion(guarded):
    before, after = before_and_after(guarded)
    assert 0.2 * BEST_SCORE <= before["eval/true_score"] <= 0.6 * BEST_SCORE
    assert after["eval/true_score"] - before["eval/true_score"] >= 0.55 * (BEST_SCORE - before["eval/true_score"])
    assert after["eval/kl_k1"] <= 8.0
    assert after["eval/distinct"] >= 0.85
    for criterion in CRITERIA:
        assert after[f"eval/{criterion}"] >= before[f"eval/{criterion}"] - 0.05


@pytest.mark.nightly
def test_without_the_kl_term_the_learned_reward_rises_and_the_true_score_stays_behind(guarded):
    """How far it falls depends on the rounding of the machine; far below what the KL term keeps it ends on each."""
    _, kept = before_and_after(guarded)
    words = ("--set", "trainer_config.init_kl_coef=0", "--set", "trainer_config.actor_lr=2e-3")
    status, out, err = finish(start(CONFIG, "--output-dir", str(guarded), "--type", "RL", *words), 1400)
    assert status == 0, err
    before, after = before_and_after(guarded)
    assert after["eval/reward"] > before["eval/reward"] + 1.0
    assert after["eval/true_score"] < kept["eval/true_score"] - 1.0
