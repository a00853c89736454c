"""Rows assigned to ranks: every one somewhere, groups whole, about as much for each, and put back in order."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from chatrlhf.rl import data_parallel


def on_each(monkeypatch, ranks: int, function, *args) -> list:
    """What a function gives on each of so many ranks."""
    monkeypatch.setattr(data_parallel, "world_size", lambda: ranks)
    found = []
    for number in range(ranks):
        monkeypatch.setattr(data_parallel, "rank", lambda number=number: number)
        found.append(function(*args))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_groups_stay_whole_and_every_row_is_sampled_once(monkeypatch, ranks):
    group_ids = torch.arange(5).repeat_interleave(4)
    shares = on_each(monkeypatch, ranks, data_parallel.rollout_rows, group_ids)
    assert torch.cat(shares).tolist() == list(range(20))
    for rows in shares:
        assert len(rows) % 4 == 0 and 4 * (5 // ranks) <= len(rows) <= 4 * -(-5 // ranks)


def test_with_fewer_groups_than_ranks_none_is_without_rows(monkeypatch):
    shares = on_each(monkeypatch, 5, data_parallel.rollout_rows, torch.tensor([0, 0, 1, 1]))
    assert all(len(rows) == 2 for rows in shares)
    assert set(torch.cat(shares).tolist()) == {0, 1, 2, 3}


@dataclass
class Share:
    numbers: torch.Tensor
    table: torch.Tensor
    texts: list[str]
    nothing: None = None


def test_shares_become_the_batch_again_narrower_ones_padded():
    first = Share(torch.tensor([2.0, 3.0]), torch.tensor([[True], [True]]), ["c", "d"])
    second = Share(torch.tensor([0.0, 1.0]), torch.tensor([[True, True], [True, False]]), ["a", "b"])
    whole = data_parallel.merge_shards([first, second], [torch.tensor([2, 3]), torch.tensor([0, 1])])
    assert whole.numbers.tolist() == [0, 1, 2, 3]
    assert whole.table.tolist() == [[True, True], [True, False], [True, False], [True, False]]
    assert whole.texts == ["a", "b", "c", "d"] and whole.nothing is None


def test_in_one_process_a_share_is_the_batch():
    share = Share(torch.zeros(1), torch.zeros(1, 1), ["a"])
    assert data_parallel.merge_shards([share], [None]) is share


def test_a_row_that_several_ranks_have_sampled_is_held_by_one(monkeypatch):
    rows = [torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([2, 3])]
    held = on_each(monkeypatch, 3, data_parallel.local_rows, rows)
    assert [each.tolist() for each in held] == [[-1, -1, -1, -1], [0, 1, -1, -1], [-1, -1, 0, 1]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_a_minibatch_is_dealt_out_evenly_by_length(monkeypatch, ranks):
    torch.manual_seed(0)
    lengths = torch.randint(1, 200, (7 * ranks,))
    shares = on_each(monkeypatch, ranks, data_parallel.update_rows, lengths, None)
    assert sorted(torch.cat(shares).tolist()) == list(range(7 * ranks))
    tokens = [int(lengths[rows].sum()) for rows in shares]
    assert max(tokens) - min(tokens) <= int(lengths.max())
    assert {len(rows) for rows in shares} == {7}


def test_rows_stay_where_their_states_are(monkeypatch):
    trunk_rows = torch.tensor([1, -1, 0, -1])
    assert on_each(monkeypatch, 2, data_parallel.update_rows, torch.tensor([5, 6, 7, 8]), trunk_rows)[0].tolist() == [
        0,
        2,
    ]
