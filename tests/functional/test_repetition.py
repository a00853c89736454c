"""Distinct and repeated n-grams, by hand and against a slow twin."""

from __future__ import annotations

import pytest
import torch

from chatrlhf.functional.repetition import distinct_ngrams, repeated_ngrams


def tensors(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    mask = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
    return ids, mask


def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]


def test_by_hand():
    # Pairs: 12 23 31 12 | 12 22: six, of which 12, 23, 31, 22 differ. Within a reply 12 is said twice in the first.
    ids, mask = tensors([[1, 2, 3, 1, 2], [1, 2, 2]])
    assert distinct_ngrams(ids, mask, 2) == pytest.approx(4 / 6)
    assert repeated_ngrams(ids, mask, 2) == pytest.approx(1 / 6)


@pytest.mark.parametrize("rows", [[[1]], [[1, 2]], [[1, 2, 3], [4]]])
def test_replies_too_short_for_an_n_gram_say_nothing(rows):
    ids, mask = tensors(rows)
    assert distinct_ngrams(ids, mask, 4) == 1 and repeated_ngrams(ids, mask, 4) == 0


@pytest.mark.parametrize("n", [1, 2, 4])
def test_against_a_slow_twin(n):
    generator = torch.Generator().manual_seed(n)
    rows = [
        torch.randint(0, 4, (int(length),), generator=generator).tolist()
        for length in torch.randint(1, 40, (30,), generator=generator)
    ]
    ids, mask = tensors(rows)
    found = [gram for row in rows for gram in grams(row, n)]
    assert distinct_ngrams(ids, mask, n) == pytest.approx(len(set(found)) / len(found))
    long = [grams(row, n) for row in rows if len(grams(row, n)) > 1]
    again = sum(len(each) - len(set(each)) for each in long)
    assert repeated_ngrams(ids, mask, n) == pytest.approx(again / sum(map(len, long)))


def test_order_matters_and_padding_does_not():
    ids, mask = tensors([[1, 2, 2, 1], [5, 6]])
    assert distinct_ngrams(ids, mask, 2) == 1
    wider = (
        torch.cat([ids, torch.full((2, 3), 9)], dim=1),
        torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1),
    )
    assert distinct_ngrams(*wider, 2) == 1 and repeated_ngrams(*wider, 1) == repeated_ngrams(
        ids, mask, 1
    ) == pytest.approx(2 / 6)
