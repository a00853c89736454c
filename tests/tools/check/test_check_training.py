"""`chatrlhf check --deep`: microbatches add up, two steps repeat, a few rows are learned."""

from __future__ import annotations

import itertools
import json

import torch

from chatrlhf.conversation import Prompt
from chatrlhf.data.stage_rows import Preference, ScoredCompletion
from chatrlhf.tools.check import training
from chatrlhf.tools.check.models import check_actor, check_reward_model
from chatrlhf.tools.check.policy import check_policy
from chatrlhf.tools.check.training import check_microbatches, orders_pairs, overfits_rows, some_pairs

ACTOR = ["ACTOR batch arithmetic", "ACTOR determinism", "ACTOR learns a few rows"]


def statuses(results) -> dict[str, str]:
    return {result.name: result.status for result in results}


def test_a_loss_that_falls_by_half_is_enough_and_no_more_steps_are_made():
    losses = iter([4.0, 3.0, 2.0, 1.0])
    result = overfits_rows(losses, 8)
    assert result.status == "pass" and "from 4.00 to 2.00 nats a token in 2 steps" in result.measured
    assert next(losses) == 1.0
    assert overfits_rows([0.05], 8).status == "pass"  # known already
    result = overfits_rows([4.0, 2.1, 3.0], 8)
    assert result.status == "fail" and result.remedy
    assert overfits_rows([4.0, float("nan")], 8).status == "fail"


def test_all_pairs_have_to_be_in_the_right_order():
    accuracies = iter([0.5, 1.0, 0.75])
    result = orders_pairs(accuracies, 32)
    assert result.status == "pass" and result.measured == "100% of 32 pairs are in the right order after 1 steps"
    assert next(accuracies) == 0.75
    assert orders_pairs([0.5, 0.97], 32).status == "fail"


def test_gradients_are_compared_by_norm():
    whole = [torch.tensor([3.0, 4.0]), torch.tensor([0.0])]
    assert check_microbatches("a", whole, [each + 1e-6 for each in whole], 8, "fp32").status == "pass"
    assert check_microbatches("a", whole, [each + 1e-2 for each in whole], 8, "fp32").status == "fail"
    assert check_microbatches("a", whole, [each + 1e-2 for each in whole], 8, "bf16").status == "pass"
    assert check_microbatches("a", [torch.zeros(2)], [torch.zeros(2)], 8, "fp32").status == "fail"  # nothing is trained


def test_pairs_of_scores_are_of_the_better_and_the_worse_half():
    prompt = Prompt.of("q")
    scored = [ScoredCompletion(prompt, f"reply {i}", float(i // 2)) for i in range(4)]
    assert some_pairs(scored) == [[(prompt, f"reply {i + 2}"), (prompt, f"reply {i}")] for i in range(2)]
    assert some_pairs([ScoredCompletion(prompt, "a", 1.0)] * 4) == []
    assert some_pairs([Preference(prompt, "a", "b")]) == [[(prompt, "a"), (prompt, "b")]]


def test_the_small_run_passes_all(session):
    made = session("ACTOR REWARD RL", deep=True)
    results = statuses([*check_actor(made), *check_reward_model(made), *check_policy(made)])
    assert set(results.values()) == {"pass"}
    assert {*ACTOR, "REWARD learns pairs", "RL batch arithmetic"} < results.keys()


def test_means_over_microbatches_do_not_add_up(session, monkeypatch):
    make = training.microbatch_loss

    def of_means(model, config):
        loss = make(model, config)
        return lambda ids, mask, labels: loss(ids, mask, labels) / (labels != training.IGNORED).sum()

    monkeypatch.setattr(training, "microbatch_loss", of_means)
    assert statuses(check_actor(session("ACTOR", deep=True)))[ACTOR[0]] == "fail"


def test_steps_that_differ_are_told(session, monkeypatch):
    make, count = training.microbatch_loss, itertools.count(1)

    def drifting(model, config):
        loss = make(model, config)
        return lambda *piece: loss(*piece) * next(count)

    monkeypatch.setattr(training, "microbatch_loss", drifting)
    assert statuses(check_actor(session("ACTOR", deep=True)))[ACTOR[1]] == "warn"


def test_weights_that_do_not_move_learn_nothing(session, monkeypatch):
    monkeypatch.setattr(training, "LR_TIMES_WIDTH", 0.0)
    monkeypatch.setattr(training, "ACTOR_STEPS", 3)
    monkeypatch.setattr(training, "PAIR_STEPS", 3)
    made = session("ACTOR REWARD", deep=True)
    results = statuses([*check_actor(made), *check_reward_model(made)])
    assert results[ACTOR[2]] == "fail" and results["REWARD learns pairs"] == "fail"


def test_pairs_that_contradict_each_other_cannot_be_learned(session, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PAIR_STEPS", 10)
    rows = json.loads((data / "pairs.json").read_text())[:10]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "pairs.json").write_text(json.dumps([*rows, *turned]))
    keys = {"reward_config__train_dataset_path": str(tmp_path / "pairs.json")}
    made = session("REWARD", deep=True, reward_config__validation_fraction=0.0, **keys)
    assert statuses(check_reward_model(made))["REWARD learns pairs"] == "fail"
