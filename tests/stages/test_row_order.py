"""In which order rows are seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler

from chatrlhf.data.epochs import Epochs
from chatrlhf.stages.row_order import EpochOrder, by_length, widths

LENGTHS = np.random.default_rng(0).lognormal(4, 1, 1003).astype(np.int64) + 1


def seen(order: EpochOrder, epoch: int = 0) -> list[int]:
    order.set_epoch(epoch)
    return list(order)


def batches(rows: list[int], size: int) -> list[list[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padding(rows: list[int], size: int, lengths=LENGTHS) -> int:
    """Tokens that fill up rows to the longest one of their batch."""
    return sum(max(lengths[batch]) * len(batch) - sum(lengths[batch]) for batch in batches(rows, size))


def test_without_lengths_it_is_the_order_of_transformers_trainer():
    theirs = SeedableRandomSampler(range(29), data_seed=3)
    for epoch in (0, 1, 5):
        theirs.set_epoch(epoch)
        assert seen(EpochOrder(Epochs.of_all(29), 4, 3), epoch) == list(theirs)


@pytest.mark.parametrize("size", [2, 8, 32])
def test_less_is_padding(size):
    plain, grouped = EpochOrder(Epochs.of_all(1003), size, 3), EpochOrder(Epochs.of_all(1003), size, 3, LENGTHS)
    assert padding(seen(grouped), size) < 0.35 * padding(seen(plain), size)
    # Of microbatches, too.
    assert padding(seen(grouped), size // 2) < 0.35 * padding(seen(plain), size // 2) or size == 2


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 63, 64, 1003])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_sees_each_row_once(rows, epoch):
    order = EpochOrder(Epochs.of_all(rows), 8, 3, LENGTHS[:rows])
    assert sorted(seen(order, epoch)) == list(range(rows)) and len(order) == rows


def test_the_longest_row_comes_first_and_a_batch_from_long_to_short():
    for epoch in range(3):
        rows = seen(EpochOrder(Epochs.of_all(1003), 8, 3, LENGTHS), epoch)
        assert LENGTHS[rows[0]] == LENGTHS.max()
        for batch in batches(rows, 8):
            assert list(LENGTHS[batch]) == sorted(LENGTHS[batch], reverse=True)


def test_steps_do_not_go_from_long_to_short():
    rows = seen(EpochOrder(Epochs.of_all(1003), 8, 3, LENGTHS))
    means = np.array([LENGTHS[batch].mean() for batch in batches(rows, 8)])
    assert 0.35 < (np.diff(means) < 0).mean() < 0.65


def test_seed_and_epoch_draw_the_batches():
    def made(seed: int, epoch: int) -> set[frozenset[int]]:
        order = EpochOrder(Epochs.of_all(1003), 8, seed, LENGTHS)
        return {frozenset(batch) for batch in batches(seen(order, epoch), 8)}

    assert made(3, 0) == made(3, 0)
    # Other batches, not only the same ones in another order.
    assert len(made(3, 0) & made(3, 1)) < 5 and len(made(3, 0) & made(4, 0)) < 5


def test_rows_of_one_length_are_as_good_as_shuffled():
    order = by_length(np.arange(64), np.full(64, 9), 8, torch.Generator().manual_seed(0))
    assert sorted(order) == list(range(64))
    first, *others = batches(order.tolist(), 8)
    assert first == list(range(8)) and others != sorted(others)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_sees_its_own_rows(lengths):
    epochs = Epochs((np.array([5, 9, 900, 5]), np.array([1, 2, 3, 9])))
    order = EpochOrder(epochs, 2, 3, lengths)
    assert len(order) == 4
    assert [sorted(seen(order, epoch)) for epoch in range(3)] == [[5, 5, 9, 900], [1, 2, 3, 9], [5, 5, 9, 900]]


def test_a_row_is_as_wide_as_its_longest_column():
    dataset = {"chosen": [[1], [1, 2, 3]], "rejected": [[1, 2], [1]]}
    assert widths(dataset, "chosen", "rejected").tolist() == [2, 3]
