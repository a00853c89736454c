"""The table at the end of a run, number by number."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from chatrlhf.rl.comparison import gap_closed, show_comparison
from chatrlhf.rl.held_out import HeldOutReport

BEFORE = HeldOutReport(
    prompts=["Hi", "Bye"] * 4,
    completions=["well [bold]", "no"] * 4,
    rewards=[1.0, 4.0] * 4,
    kl=0.0,
    length=12.25,
    finished=0.5,
    distinct=1.0,
    criteria={"polite": [1.0, 0.0] * 4, "short": [0.5, 1.0] * 4},
)
AFTER = replace(
    BEFORE,
    completions=["well", "x" * 301] * 4,
    rewards=[3.0, 6.0] * 4,
    kl=2.5,
    length=9.0,
    finished=1.0,
    distinct=0.5,
    criteria={"polite": [1.0, 1.0] * 4, "short": [0.75, 1.0] * 4},
)


def said(before: HeldOutReport, after: HeldOutReport, best: float | None) -> str:
    console = Console(file=io.StringIO(), width=400)
    show_comparison(console, before, after, best)
    return console.file.getvalue()


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│\n").split("│")] for line in text.splitlines() if "│" in line]


def test_numbers_of_a_report_by_hand():
    # 1 and 4: mean 2.5, deviation 1.5. Criteria: (1 + 0 + 0.5 + 1) / 2 prompts, each four times.
    assert BEFORE.metrics() == {
        "eval/reward": 2.5,
        "eval/reward_std": 1.5,
        "eval/kl": 0.0,
        "eval/length": 12.25,
        "eval/finished": 0.5,
        "eval/distinct": 1.0,
        "eval/true_score": 1.25,
        "eval/polite": 0.5,
        "eval/short": 0.75,
    }


def test_the_table_by_hand():
    text = said(BEFORE, AFTER, best=2.0)
    assert "8 held-out prompts, one sample each" in text
    assert rows(text)[:9] == [
        ["true score (best 2)", "1.25", "1.88", "+0.62"],
        ["polite", "0.50", "1.00", "+0.50"],
        ["short", "0.75", "0.88", "+0.12"],
        ["learned reward", "2.50", "4.50", "+2.00"],
        ["its deviation", "1.50", "1.50", "+0.00"],
        ["KL to the SFT actor (nats, k3)", "0.00", "2.50", "+2.50"],
        ["length (tokens)", "12.2", "9.0", "-3.2"],
        ["finished", "0.50", "1.00", "+0.50"],
        ["distinct completions", "1.00", "0.50", "-0.50"],
    ]
    # 0.625 of 0.75; 2 of 1.5.
    assert "RL closed 0.83 of the distance" in text
    assert "RL moved the learned reward by +1.33 standard deviations" in text


def test_completions_stand_side_by_side_as_they_are():
    shown = rows(said(BEFORE, AFTER, None))
    assert ["Hi", "well [bold]", "well"] in shown
    assert ["Bye", "no", "x" * 297 + "..."] in shown
    whole = replace(AFTER, completions=["well", "x" * 300] * 4)
    assert ["Bye", "no", "x" * 300] in rows(said(BEFORE, whole, None))


def test_what_cannot_be_said_is_not_said():
    """No criteria, no best score, equal rewards."""
    bare = [replace(each, criteria={}) for each in (BEFORE, AFTER)]
    assert "true score" not in said(*bare, best=2.0) and "RL closed" not in said(*bare, best=2.0)
    assert "true score " in said(BEFORE, AFTER, None) and "RL closed" not in said(BEFORE, AFTER, None)
    assert "standard deviations" not in said(replace(BEFORE, rewards=[1.0, 1.0] * 4), AFTER, None)
    few = [replace(each, prompts=each.prompts[:7]) for each in (BEFORE, AFTER)]
    assert "standard deviations" not in said(*few, None)
    assert "by +6.00 standard deviations" in said(replace(BEFORE, rewards=[1.0, 2.0] * 4), AFTER, None)


@pytest.mark.parametrize(("best", "share"), [(2.0, 0.625 / 0.75), (1.5, 2.5), (1.25, None), (1.0, None)])
def test_gap_closed_by_hand(best, share):
    assert gap_closed(BEFORE, AFTER, best) == (share and pytest.approx(share))
