"""What RL asks of the stages before it, by their held-out figures alone."""

from __future__ import annotations

import math

import pytest

from chatrlhf.stages.readiness import why_a_coin, why_untrained

CHANCE = math.log(50_000)  # 10.82


def actor(start: float, end: float, chance: float = CHANCE) -> dict[str, float]:
    return {"loss/eval_start": start, "loss/eval": end, "loss/chance": chance}


@pytest.mark.parametrize(
    ("start", "end", "said"),
    [
        (10.9, 10.82, "is that of guessing"),
        (10.9, 10.3, "is that of guessing"),  # 95.2 % of ln V
        (9.0, 8.7, "fell by 3.3%"),
        (9.0, 9.4, "rose by 4.4%"),
        (2.0, 1.999, "fell by 0.0%"),
        (2.0, 2.4, "rose by 20.0%"),
        (2.0, 2.0, "fell by 0.0%"),
    ],
)
def test_an_actor_that_has_learned_nothing(start, end, said):
    assert said in (why_untrained(actor(start, end)) or "")


@pytest.mark.parametrize(("start", "end"), [(10.9, 9.0), (9.0, 8.5), (2.0, 1.95), (2.0, 1.2), (0.3, 0.29)])
def test_an_actor_that_has_learned(start, end):
    """One that was good before may improve by two in a hundred."""
    assert why_untrained(actor(start, end)) is None


def test_where_nothing_is_held_out_nothing_is_claimed():
    assert why_untrained({"loss/train": 11.0, "loss/chance": CHANCE}) is None
    assert why_a_coin({"loss/train": 0.7}) is None


@pytest.mark.parametrize(("low", "is_one"), [(0.31, True), (0.5, True), (0.51, False), (0.9, False)])
def test_a_reward_model_is_a_coin_where_its_interval_reaches_a_half(low, is_one):
    said = why_a_coin(
        {"reward/accuracy": 0.95, "reward/accuracy_low": low, "reward/accuracy_high": 0.99, "reward/held_out_rows": 20}
    )
    assert (said is not None) == is_one
    if is_one:
        assert f"95 % interval {low:.1%} to 99.0%" in said
