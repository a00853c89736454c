"""Broken, repeated and empty texts; the interval of a mean change."""

from __future__ import annotations

import random
import statistics

import pytest

from chatrlhf.functional.texts import is_broken, mean_interval, repeated_share

ENGLISH = (
    "The museum opens at nine in the morning and closes at five. Tickets are sold at the entrance, and children under "
    "twelve do not pay. If you come by train, leave the station by the western door and follow the river."
)


@pytest.mark.parametrize(
    "text", [ENGLISH, "", "日本語の文章です。", "naïve café — 50 €", "👩‍🚀 emoji\n\tand tabs", "Привет, мир", "مرحبا"]
)
def test_texts_of_people_are_not_broken(text):
    assert not is_broken(text)


@pytest.mark.parametrize("text", ["\ufffd\ufffd", "a\x00b", "caf\ufffd", "\ue000\ue001", "\ud800 x"])
def test_bytes_that_are_no_text_are(text):
    assert is_broken(text)


def test_one_broken_character_in_a_long_text_is_borne():
    assert not is_broken(ENGLISH + "\ufffd") and is_broken(ENGLISH[:40] + "\ufffd")


def test_repetition_by_hand():
    # 24 + 6 - 1 = 29 characters of period 3: 24 grams, 3 of which differ.
    assert repeated_share("abc" * 9 + "ab") == pytest.approx(1 - 3 / 24)
    assert repeated_share("abc" * 7) == 0  # too short to say anything
    assert repeated_share(ENGLISH) < 0.1 < 0.8 < repeated_share("I am sorry. " * 20)


def test_an_intervals_coverage():
    """Of 200 samples of 30 about 95 in a hundred hold the mean."""
    draw = random.Random(1)
    held = 0
    for _ in range(200):
        low, high = mean_interval([draw.gauss(0.3, 1.0) for _ in range(30)], resamples=500)
        held += low <= 0.3 <= high
    assert 0.89 <= held / 200 <= 0.99


def test_an_interval_holds_the_mean_and_is_a_point_where_nothing_varies():
    changes = [1.0, 2.0, 4.0, 0.5]
    low, high = mean_interval(changes)
    assert low < statistics.fmean(changes) < high
    assert mean_interval([2.0] * 9) == (2.0, 2.0) and mean_interval(changes) == (low, high)
