"""Rows beyond the context: left out, or cut, and counted either way."""

from __future__ import annotations

import pytest
import tiny

from chatrlhf.config.schema import ActorConfig, RewardConfig
from chatrlhf.conversation import Prompt, Turn
from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference, ScoredCompletion
from chatrlhf.data.templates import FORMATS
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.stages import reward, sft

SHORT = Prompt.of("the cat")
LONG = Prompt((Turn("user", "on the mat " * 5), Turn("assistant", "sat"), Turn("user", "the cat")))


class Log:
    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def encoder(context: int) -> Encoder:
    return Encoder(tiny.tokenizer(), FORMATS["hh"], context)


@pytest.mark.parametrize(
    ("policy", "rows", "said"),
    [
        ("drop", 1, ["ACTOR: 3 of 4 rows of x exceed 40 tokens and are dropped"]),
        ("cut", 3, ["exceed 40 tokens and are cut", "ACTOR: 1 of 4 rows of x exceed 40 tokens and are dropped"]),
    ],
)
def test_the_actor(policy, rows, said):
    log, made = Log(), encoder(40)
    given = [
        Demonstration(Prompt.of("on the mat " * 30), "sat"),  # no token of its reply is within the context
        Demonstration(SHORT, "sat"),
        Demonstration(LONG, "sat"),
        PlainText("on the mat " * 30),
    ]
    dataset, kept = sft._dataset(given, made, ActorConfig(over_length=policy), "x", log)
    assert kept == [1, 2, 3][:rows] and len(dataset) == rows
    assert [a in b for a, b in zip(said, log.said, strict=True)] == [True] * len(said)
    assert all(len(ids) <= 40 for ids in dataset["input_ids"])
    assert all(any(label != IGNORED for label in labels) for labels in dataset["labels"])
    if policy == "cut":
        assert dataset["input_ids"][1] == dataset["input_ids"][0]  # its oldest turns have gone


@pytest.mark.parametrize("row", [ScoredCompletion(LONG, "sat", 1.0), Preference(LONG, "sat", "on")])
def test_the_reward_model(row):
    log, made = Log(), encoder(40)
    scorer = RewardScorer(None, made)
    short = type(row)(SHORT, *list(vars(row).values())[1:])
    hopeless = type(row)(SHORT, "on the mat " * 30, *list(vars(row).values())[2:])
    rows = [hopeless, short, row]
    assert reward._that_fit(rows, scorer, RewardConfig(), "x", log) == ([short], [1])
    assert log.said == ["REWARD: 2 of 3 rows of x exceed 40 tokens and are dropped"]
    log.said.clear()
    assert reward._that_fit(rows, scorer, RewardConfig(over_length="cut"), "x", log) == ([short, short], [1, 2])
    assert log.said == [
        "REWARD: 2 of 3 rows of x exceed 40 tokens and are cut",
        "REWARD: 1 of 3 rows of x exceed 40 tokens and are dropped",
    ]


@pytest.mark.parametrize(("room", "kept"), [(68, 5), (67, 4), (58, 4), (57, 2), (31, 1), (1, 1)])
def test_the_oldest_turns_go_up_to_a_users_and_the_last_one_stays(room, kept):
    """Of 5, 4, 2 and 1 turns, which begin with a user's, the prompt has 68, 58, 32 and 22 tokens."""
    said = [("user", "the cat"), ("user", "on the mat"), ("assistant", "sat"), ("user", "the cat"), ("user", "the hat")]
    turns = tuple(Turn(*each) for each in said)
    assert encoder(200).recent(Prompt(turns), room).turns == turns[-kept:]
