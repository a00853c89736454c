"""The verdict on reports made by hand: what is broken is called so, and a gain only where it can be told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from chatrlhf.rl.held_out import HeldOutReport
from chatrlhf.rl.verdict import judge

COUNT = 20
TEXTS = [
    f"Good morning. Room {number} is on floor {('one', 'two', 'three')[number % 3]}, next to the stairs; please take "
    f"a badge and be there by {number % 12}."
    for number in range(COUNT)
]
BEFORE = HeldOutReport(
    prompts=[f"prompt {number}" for number in range(COUNT)],
    completions=TEXTS,
    rewards=[0.1 * (number % 5) for number in range(COUNT)],
    kl=0.0,
    length=25.0,
    finished=0.9,
    distinct=1.0,
    kl_k1=0.0,
    reference_loss=1.2,
    demonstration_loss=1.0,
)
RISEN = [reward + 1.0 + 0.05 * (number % 3) for number, reward in enumerate(BEFORE.rewards)]


def after(**changes: Any) -> HeldOutReport:
    return replace(BEFORE, **({"rewards": RISEN, "kl": 4.0, "kl_k1": 3.9, "reference_loss": 1.5} | changes))


def garbled(text: str) -> str:
    return "".join(char if number % 4 else "\ufffd" for number, char in enumerate(text))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("GIBBERISH", {"completions": [garbled(text) for text in TEXTS]}),
        ("GIBBERISH", {"completions": [garbled(text) if i % 3 else text for i, text in enumerate(TEXTS)]}),
        ("GIBBERISH", {"reference_loss": 6.4}),
        ("REPETITIVE", {"completions": ["very good " * 12] * COUNT, "distinct": 0.5}),
        ("EMPTY", {"completions": ["", " ", "."] * 6 + TEXTS[:2]}),
        ("COLLAPSED", {"completions": TEXTS[:1] * COUNT, "distinct": 0.05}),
        ("ENDLESS", {"finished": 0.1}),
        ("OVER-OPTIMIZED", {"demonstration_loss": 3.2}),
        ("better", {}),
        ("worse", {"rewards": [reward - 1 for reward in BEFORE.rewards]}),
        ("unclear", {"rewards": BEFORE.rewards}),
        ("unclear", {"rewards": [reward + (-1) ** i for i, reward in enumerate(BEFORE.rewards)]}),
    ],
)
def test_verdicts(name, changes):
    verdict = judge(BEFORE, after(**changes))
    assert verdict.name == name, str(verdict)
    assert "95 % interval" in str(verdict) and "20 prompts" in str(verdict)


def test_faults_that_were_there_before_are_not_rls():
    """A model of characters that no one reads: what it says is no text before RL either."""
    texts = [garbled(text) for text in TEXTS]
    assert judge(replace(BEFORE, completions=texts), after(completions=texts)).name == "better"
    again = ["very good " * 12] * COUNT
    assert judge(replace(BEFORE, completions=again), after(completions=again)).name == "better"


def test_of_few_prompts_nothing_is_claimed():
    few = [
        replace(each, prompts=each.prompts[:7], completions=each.completions[:7], rewards=each.rewards[:7])
        for each in (BEFORE, after(completions=[garbled(text) for text in TEXTS]))
    ]
    assert str(judge(*few)) == "verdict: unclear. 7 held-out prompts are too few for a claim (8 at least)"


def test_the_true_score_decides_where_there_is_one():
    true = {"polite": [0.5] * COUNT}
    fallen = {"polite": [0.5 - 0.02 * (number % 4) for number in range(COUNT)]}
    assert judge(replace(BEFORE, criteria=true), after(criteria=fallen)).name == "OVER-OPTIMIZED"
    assert judge(replace(BEFORE, criteria=true), after(criteria=true)).name == "unclear"
    risen = {"polite": [0.7] * COUNT}
    verdict = judge(replace(BEFORE, criteria=true), after(criteria=risen))
    assert verdict.name == "better" and "true score changed by +0.2" in str(verdict)


def test_reports_of_earlier_versions_are_judged_by_what_they_have():
    old = [replace(each, reference_loss=None, demonstration_loss=None, kl_k1=None) for each in (BEFORE, after())]
    assert judge(*old).name == "better"
