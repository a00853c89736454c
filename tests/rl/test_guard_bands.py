"""Each guard rings on figures made for it and is silent on those of a good run; a resumed run rings the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from chatrlhf.config.guards import GuardsConfig
from chatrlhf.rl.guards import GUARDS, Guards

GOOD = {
    "kl/token": 0.2,
    "kl/ref": 6.0,
    "ppo/entropy": 1.1,
    "response/repetition": 0.05,
    "response/distinct_2": 0.4,
    "response/length": 30.0,
    "response/finished": 0.8,
    "ppo/clipfrac": 0.1,
    "ppo/explained_variance": 0.3,
    "reward/std": 0.7,
    "eval/forgotten": 0.1,
}
BAD = {
    "kl_per_token": {"kl/token": 1.5},
    "kl_per_reply": {"kl/ref": 120.0},
    "entropy": {"ppo/entropy": 0.001},
    "repetition": {"response/repetition": 0.9},
    "distinct_2": {"response/distinct_2": 0.001},
    "length_change": {"response/length": 200.0},
    "finished_drop": {"response/finished": 0.1},
    "clip_fraction": {"ppo/clipfrac": 0.8},
    "explained_variance": {"ppo/explained_variance": -3.0},
    "flat_rewards": {"reward/std": 0.0},
    "forgotten": {"eval/forgotten": 2.8},
}
WINDOW = 4


def guards(**keys: Any) -> tuple[Guards, list[str]]:
    said: list[str] = []
    return Guards(GuardsConfig(window=WINDOW, **keys), said.append), said


def look(made: Guards, rows: list[dict[str, float]], begin: int = 1) -> list[dict[str, float]]:
    return [made.look(step, row) for step, row in enumerate(rows, start=begin)]


def test_there_is_a_case_for_each():
    assert (
        BAD.keys()
        == {guard.name for guard in GUARDS}
        == set(GuardsConfig.model_fields)
        - {
            "skipped_steps",
            "allow_untrained_actor",
            "stop_at_coin_flip",
            "window",
            "silence",
        }
    )


@pytest.mark.parametrize("name", BAD)
def test_it_rings_alone_and_once(name):
    made, said = guards()
    rung = look(made, [GOOD] * WINDOW + [GOOD | BAD[name]] * 8)
    assert not any(rung[:WINDOW])
    assert rung[-1].keys() == {f"guard/{name}"}
    assert len(said) == 1 and f"(guards_config.{name})" in said[0]
    assert made.stopped is None
    (line,) = made.summary()
    assert line.startswith(f"{name}: ") and "to the end" in line


def test_a_good_run_is_silent():
    made, said = guards()
    assert not any(look(made, [GOOD] * 40)) and said == [] and made.summary() == []


@pytest.mark.parametrize("name", BAD)
def test_it_stops_where_it_is_told_to(name):
    below = next(guard for guard in GUARDS if guard.name == name).below
    ((metric, value),) = BAD[name].items()
    made, said = guards()
    figure = look(made, [GOOD] * WINDOW + [GOOD | BAD[name]] * WINDOW)[-1][f"guard/{name}"]
    limit = figure + 0.0001 if below else figure - 0.0001
    made, said = guards(**{name: (None, limit)})
    look(made, [GOOD] * WINDOW + [GOOD | {metric: value}] * WINDOW)
    assert made.stopped is not None and f"guards_config.{name} stops at" in made.stopped


@pytest.mark.parametrize("name", BAD)
def test_it_can_be_turned_off(name):
    made, said = guards(**{name: (None, None)})
    assert not any(look(made, [GOOD] * WINDOW + [GOOD | BAD[name]] * 8)) and said == []


def test_one_batch_does_not_ring_it():
    made, said = guards()
    look(made, [GOOD, GOOD | BAD["kl_per_token"], GOOD, GOOD, GOOD | BAD["kl_per_token"], GOOD] * 3)
    assert said == []


def test_it_says_so_again_where_it_had_been_well_in_between():
    made, said = guards()
    look(made, ([GOOD] * 8 + [GOOD | BAD["clip_fraction"]] * 8) * 2)
    assert len(said) == 2
    assert made.rung["clip_fraction"]["since"] == 11  # the third of four: the median is between the two


def test_short_replies_count_as_a_change_too():
    made, said = guards()
    look(made, [GOOD] * WINDOW + [GOOD | {"response/length": 2.0}] * 8)
    assert "15.0 times as long, or as short" in said[0]


def test_a_resumed_run_rings_at_the_same_step():
    rows = [GOOD] * 6 + [GOOD | BAD["length_change"] | BAD["entropy"]] * 6
    whole, _ = guards()
    first, _ = guards()
    rung = look(whole, rows)
    assert look(first, rows[:8]) == rung[:8]
    resumed, _ = guards()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert look(resumed, rows[8:], begin=9) == rung[8:]
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize("keys", [{"kl_per_token": (2.0, 1.0)}, {"entropy": (0.1, 0.2)}])
def test_where_it_stops_is_behind_where_it_warns(keys):
    with pytest.raises(ValidationError, match="the second where it stops, which must be"):
        GuardsConfig(**keys)
