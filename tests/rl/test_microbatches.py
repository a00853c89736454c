"""Microbatches of similar length: every row once, within the budget, and no cheaper cut anywhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from chatrlhf.rl.microbatches import cut_by_length


def lists(pieces: list[torch.Tensor]) -> list[list[int]]:
    return [piece.tolist() for piece in pieces]


def test_by_hand():
    # 10 + 10 and 2 + 2 + 2, at 26 + 2 * 3 of cost; in one piece it would be 50 + 3, which is over the budget too.
    assert lists(cut_by_length(torch.tensor([2, 10, 2, 10, 2]), rows_at_longest=3, overhead=3)) == [[1, 3], [0, 2, 4]]


def test_short_rows_may_be_more_than_the_longest_that_fit():
    assert lists(cut_by_length(torch.tensor([8, 2, 2, 2, 2]), rows_at_longest=1, overhead=1)) == [[0], [1, 2, 3, 4]]


def test_rows_of_one_length_are_cut_by_the_budget_alone():
    assert lists(cut_by_length(torch.full((5,), 7), rows_at_longest=2)) in (
        [[0], [1, 2], [3, 4]],
        [[0, 1], [2], [3, 4]],
        [[0, 1], [2, 3], [4]],
    )
    assert len(cut_by_length(torch.full((5,), 7), rows_at_longest=5)) == 1


def test_packed_rows_share_a_microbatch_whatever_their_lengths():
    # 26 tokens in all, under a budget of 30; padded they would be 50.
    assert len(cut_by_length(torch.tensor([2, 10, 2, 10, 2]), rows_at_longest=3, packed=True, overhead=3)) == 1
    assert len(cut_by_length(torch.tensor([2, 10, 2, 10, 2]), rows_at_longest=2, packed=True, overhead=3)) == 2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows_at_longest, overhead", [(2, 1), (3, 10), (8, 4), (8, 1000)])
@pytest.mark.parametrize("packed", [False, True])
def test_no_cut_of_the_sorted_rows_is_cheaper(seed, rows_at_longest, overhead, packed):
    lengths = torch.randint(1, 40, (8,), generator=torch.Generator().manual_seed(seed))
    pieces = cut_by_length(lengths, rows_at_longest, packed, overhead)
    assert sorted(torch.cat(pieces).tolist()) == list(range(8))
    budget = rows_at_longest * int(lengths.max())

    def cost(parts: list[list[int]]) -> float:
        sizes = [sum(part) if packed else len(part) * max(part) for part in parts]
        return sum(sizes) + overhead * len(parts) if max(sizes) <= budget else float("inf")

    ordered = sorted(lengths.tolist(), reverse=True)
    cheapest = float("inf")
    for places in itertools.product([False, True], repeat=7):  # cut behind row i, or not
        ends = [i + 1 for i, here in enumerate(places) if here] + [8]
        cheapest = min(cheapest, cost([ordered[a:b] for a, b in zip([0, *ends], ends, strict=False)]))
    assert cost([lengths[piece].tolist() for piece in pieces]) == cheapest < float("inf")
