"""The embedded default keeps its promises: RL makes the replies better by the rule that training never saw."""

from __future__ import annotations

import json

import pytest
from small_run import ROOT, finish, start

from chatrlhf.samples.desk import BEST_SCORE, CRITERIA


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_rl_closes_most_of_the_gap_without_losing_a_criterion(tmp_path):
    run_dir = tmp_path / "run"
    status, out, err = finish(start(str(ROOT / "config.yaml"), "--output-dir", str(run_dir), "--type", "ALL"), 1400)
    assert status == 0, err
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    before, *_, after = [row for row in rows if row["stage"] == "RL" and "eval/true_score" in row]
    assert before["step"] == 0 and 0.2 * BEST_SCORE <= before["eval/true_score"] <= 0.6 * BEST_SCORE
    closed = (after["eval/true_score"] - before["eval/true_score"]) / (BEST_SCORE - before["eval/true_score"])
    assert closed >= 0.55
    assert after["eval/kl"] <= 8.0
    assert after["eval/distinct"] >= 0.85
    for criterion in CRITERIA:
        assert after[f"eval/{criterion}"] >= before[f"eval/{criterion}"] - 0.05
    assert f"RL closed {closed:.2f} of the distance" in out
