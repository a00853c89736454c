"""What each stage draws from a record, and judgements turned into each other."""

import random
from itertools import combinations

import pytest

from chatrlhf.conversation import Conversation, Pair, Prompt, Ranked, Scored
from chatrlhf.data.stage_rows import (
    Demonstration,
    PlainText,
    Preference,
    ScoredCompletion,
    demonstrations,
    preferences,
    prompts,
    scored_completions,
)
from chatrlhf.errors import DataError

A = Prompt.of("a")


@pytest.mark.parametrize(
    ("answers", "best"),
    [
        ({"completion": "b", "pair": Pair("c", "d")}, ["b"]),
        ({"pair": Pair("c", "d")}, ["c"]),
        ({"ranked": (Ranked("e", 2), Ranked("f", 1), Ranked("g", 1))}, ["f", "g"]),
        ({"scored": (Scored("h", -1.0), Scored("i", 0.0), Scored("j", None))}, ["i"]),
        ({}, []),
    ],
)
def test_the_actor_imitates_the_best(answers, best):
    assert demonstrations(Conversation(A, **answers)) == [Demonstration(A, completion) for completion in best]


def test_plain_text():
    record = Conversation(text="Once.")
    assert demonstrations(record) == [PlainText("Once.")]
    assert prompts(record) == [] and prompts(Conversation(A)) == [A]


def test_scores_to_pairs_keep_the_order():
    chance = random.Random(1)
    for _ in range(50):
        scores = [float(chance.randrange(4)) for _ in range(chance.randrange(6))]
        given = {f"text {i}": score for i, score in enumerate(scores)}
        pairs = preferences(Conversation(A, scored=tuple(Scored(text, score) for text, score in given.items())))
        assert all(given[pair.chosen] > given[pair.rejected] for pair in pairs)
        assert len(pairs) == sum(x != y for x, y in combinations(scores, 2))
        assert len(set(pairs)) == len(pairs)


def test_equals_are_no_pair():
    ranked = (Ranked("b", 1), Ranked("c", 0), Ranked("d", 1))
    assert preferences(Conversation(A, ranked=ranked)) == [Preference(A, "c", "b"), Preference(A, "c", "d")]


def test_scores_are_not_made_up():
    assert scored_completions(Conversation(A, scored=(Scored("b", 0.0),))) == [ScoredCompletion(A, "b", 0.0)]
    for answers in ({"pair": Pair("b", "c")}, {"ranked": (Ranked("b", 0),)}):
        with pytest.raises(DataError, match="no scores, which cannot be made up; train on preferences"):
            scored_completions(Conversation(A, **answers))
    with pytest.raises(DataError, match="it is null; score the file first: python artifacts/generate_rewards.py"):
        scored_completions(Conversation(A, scored=(Scored("b", None),)))
