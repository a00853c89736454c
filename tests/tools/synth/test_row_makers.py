"""Rows in the order in which they were wanted, and rounds that end."""

from __future__ import annotations

import asyncio
import random

import pytest

from chatrlhf.errors import GenerationError
from chatrlhf.tools.synth.client import LimitReached, Limits
from chatrlhf.tools.synth.llm import NoAnswer
from chatrlhf.tools.synth.row_makers import MOST_REQUESTED, RejectedReply, collect, make_rows


class Asked:
    """What makers get; they ask nothing here."""

    limits = Limits(concurrency=3)


def maker(value, wait=0.0):
    async def make(client):
        await asyncio.sleep(wait)
        if isinstance(value, Exception):
            raise value
        return value

    return make


def test_rows_come_in_their_order_whoever_is_answered_first():
    chance = random.Random(1)
    makers = [maker(i, chance.random() / 50) for i in range(20)]
    counted = []
    made = asyncio.run(make_rows(makers, Asked(), lambda: counted.append(1)))
    assert made.rows == list(range(20))
    assert len(counted) == 20
    assert made.is_complete


def test_what_is_no_row_is_put_aside_with_its_number_and_reason():
    makers = [maker(0), maker(RejectedReply("empty", reply=""), 0.02), maker(2), maker(NoAnswer("500")), maker(4)]
    made = asyncio.run(make_rows(makers, Asked(), first=10))
    assert made.rows == [0, None, 2, None, 4]
    assert made.there == [0, 2, 4]
    assert made.aside == [
        {"row": 12, "reason": "empty", "reply": ""},
        {"row": 14, "reason": "500", "unanswered": True},
    ]
    assert (made.unanswered, made.stopped, made.is_complete) == (1, None, False)


def test_a_limit_ends_it_and_keeps_what_is_there():
    makers = [maker(0), maker(1, 0.01), maker(LimitReached("--max-cost 3")), maker(3), maker(4, 0.01), maker(5)]
    made = asyncio.run(make_rows(makers, Asked()))
    assert made.rows[:3] == [0, 1, None]
    assert made.stopped == "--max-cost 3"
    assert made.rows[5] is None  # no more were begun


def test_an_error_for_all_gives_up_what_is_being_made():
    given_up = []

    async def long(client):
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            given_up.append(1)
            raise

    with pytest.raises(GenerationError, match="401"):
        asyncio.run(make_rows([long, long, maker(GenerationError("401"), 0.01)], Asked()))
    assert len(given_up) == 2


def test_rounds_go_on_until_there_are_enough_new_ones():
    seen, asked = set(), []

    def numbered(number):
        asked.append(number)
        return maker(number // 2)  # every second one is known

    def is_new(row):
        return not (row in seen or seen.add(row))

    made, dropped = asyncio.run(collect(8, numbered, is_new, Asked()))
    assert made.rows == list(range(8))
    assert asked == list(range(15))  # 8, then 4, 2 and 1 for those that are missing
    assert dropped == 7
    assert made.is_complete


def test_rounds_end_with_a_model_that_repeats_itself():
    asked = []

    def numbered(number):
        asked.append(number)
        return maker("always this")

    made, dropped = asyncio.run(collect(5, numbered, _first_only(), Asked()))
    assert made.rows == ["always this"]
    assert len(asked) == 5 * MOST_REQUESTED
    assert dropped == len(asked) - 1


def _first_only():
    seen = set()
    return lambda row: not (row in seen or seen.add(row))


def test_an_unanswered_row_is_replaced_by_another():
    def numbered(number):
        return maker(NoAnswer("500") if number == 1 else number)

    made, _ = asyncio.run(collect(3, numbered, lambda row: True, Asked()))
    assert made.rows == [0, 2, 3]
    assert made.is_complete
