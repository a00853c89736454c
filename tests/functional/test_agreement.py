"""Agreement by hand, and against what the definitions give."""

from __future__ import annotations

import pytest

from chatrlhf.functional.agreement import pearson, ranking_accuracy, wilson_interval


def test_pearson_by_hand():
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / sqrt(2 * 2).
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    # Deviations (-3, -1, 4) and (-2, 0, 2): 14 / sqrt(26 * 8).
    assert pearson([1, 3, 8], [0, 2, 4]) == pytest.approx(14 / 208**0.5)
    assert pearson([1, 2, 3], [6, 4, 2]) == pytest.approx(-1.0)


@pytest.mark.parametrize("first, second", [([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [5, 5, 5])])
def test_pearson_of_what_does_not_vary_is_0(first, second):
    assert pearson(first, second) == 0.0


def test_ranking_accuracy_by_hand():
    # Pairs with different given values: (0, 1) in order, (0, 2) reversed, (1, 2) reversed.
    assert ranking_accuracy([2.0, 3.0, 1.0], [1, 2, 3]) == pytest.approx(1 / 3)
    # (0, 1) is tied in the predictions, (0, 2) and (1, 2) in order.
    assert ranking_accuracy([1.0, 1.0, 2.0], [1, 2, 3]) == pytest.approx(2.5 / 3)
    # (1, 2) are given alike and do not count; (0, 1) and (0, 2) are in order.
    assert ranking_accuracy([1.0, 9.0, 5.0], [1, 2, 2]) == 1.0
    assert ranking_accuracy([3.0, 1.0], [1, 2]) == 0.0
    assert ranking_accuracy([3.0, 1.0], [2, 2]) == 0.5


@pytest.mark.parametrize(
    "share, count, low, high",
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
    [
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_it_is_published(share, count, low, high):
    assert wilson_interval(share, count) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_wilson_is_of_mirror_images_and_stays_within_0_and_1():
    low, high = wilson_interval(0.2, 10)
    assert wilson_interval(0.8, 10) == (pytest.approx(1 - high), pytest.approx(1 - low))
    assert wilson_interval(0.0, 3)[0] == 0.0 and wilson_interval(1.0, 3)[1] == 1.0
    assert wilson_interval(0.5, 4, z=1.0) == (pytest.approx(0.5 - (0.5 / 5**0.5)), pytest.approx(0.5 + (0.5 / 5**0.5)))
