"""Checks of rows: repeated ones, held-out ones that are trained on, long ones."""

from __future__ import annotations

import pytest

from chatrlhf.conversation import Prompt
from chatrlhf.data import row_checks
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.inputs import Rows
from chatrlhf.data.row_checks import check_lengths, check_overlap, check_repeats, sampled
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference


def demonstrations(*numbers: int) -> list[Demonstration]:
    return [Demonstration(Prompt.of(f"question {i}"), f"answer {i}") for i in numbers]


def rows(train: list, held_out: list = ()) -> Rows:
    return Rows(train, held_out, {}, Epochs.of_all(len(train)))


def test_rows_that_all_differ_pass():
    result = check_repeats("ACTOR", rows(demonstrations(*range(100))))
    assert result.status == "pass" and result.measured.startswith("0 of 100 rows") and not result.remedy


def test_one_row_in_a_hundred_may_be_repeated_and_two_are_told():
    hundred = demonstrations(*range(99), 0)
    assert check_repeats("ACTOR", rows(hundred)).status == "pass"
    result = check_repeats("ACTOR", rows([*hundred, hundred[1], hundred[1]]))
    assert result.status == "warn" and result.measured == "3 of 102 rows repeat an earlier one (2.9%)" and result.remedy


def test_the_same_prompt_with_another_reply_is_no_repetition():
    pairs = [Preference(Prompt.of("q"), "a", "b"), Preference(Prompt.of("q"), "b", "a")]
    assert check_repeats("REWARD", rows(pairs)).status == "pass"


def test_rows_of_a_large_mixture_are_read_as_far_as_it_is_quick(monkeypatch):
    monkeypatch.setattr(row_checks, "READ_AGAIN", 2)
    result = check_repeats("ACTOR", rows(tuple(demonstrations(0, 0, 1, 2))))  # a tuple stands for what is not in memory
    assert result.measured == "1 of the first 2 rows repeat an earlier one (50.0%)"


@pytest.mark.parametrize("held_out, status", [([5, 6], "pass"), ([1, 6], "warn")], ids=["others", "one is trained on"])
def test_held_out_prompts_are_not_trained_on(held_out, status):
    known = demonstrations(0, 1, 2)
    others = [Demonstration(row.prompt, "another answer") for row in demonstrations(*held_out)]
    result = check_overlap("ACTOR", rows(known, others))
    assert result.status == status and bool(result.remedy) == (status == "warn")
    assert result.measured.startswith(f"{int(status == 'warn')} of 2 have a prompt that is also in 3 training rows")


def test_prompts_and_plain_text_are_compared_themselves():
    assert check_overlap("RL", rows([Prompt.of("a")], [Prompt.of("a")])).status == "warn"
    assert check_overlap("ACTOR", rows([PlainText("a")], [PlainText("a")])).status == "warn"
    assert check_overlap("ACTOR", rows([PlainText("a")])).measured == "none are held out"


def test_few_long_rows_pass_and_many_are_told():
    result = check_lengths("ACTOR", [10] * 95 + [60] * 5, 100, 50, "drop")
    assert result.status == "pass"
    result = check_lengths("ACTOR", [10] * 94 + [60] * 6, 200, 50, "cut")
    assert result.status == "warn" and "max_sequence_length" in result.remedy
    assert result.measured == "6 of 100 sampled rows are longer than 50 tokens and are cut (6.0%; the longest has 60)"
    assert check_lengths("ACTOR", [50], 1, 50, "drop").measured.startswith("0 of 1 rows")


def test_a_sample_is_of_all_parts():
    assert sampled(range(10), 4) == [0, 3, 6, 9] and sampled(range(3), 8) == [0, 1, 2] and sampled([], 3) == []
