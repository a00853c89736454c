"""Which rows each rank works on, and how the ranks' shares become the rollout batch again.

A rank samples and scores the responses to neighboring prompts. Then the shares are put together, so that every rank
holds the whole batch and whitening, KL and reward scaling are the same numbers everywhere without any more being said.
In the update each rank takes rows of every minibatch: about as many tokens as the others, or, where a frozen trunk's
states lie with the rank that sampled a row, those rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from chatrlhf.runtime.collectives import rank, world_size


def rollout_rows(group_ids: Tensor) -> Tensor:
    """The rows that this rank samples, [n] int64, at least one: whole groups next to each other.

    Args:
        group_ids: [B] int64 of the whole batch, samples of one prompt side by side. Where there are fewer groups than
            ranks, several ranks sample the same one, with the same random numbers.
    """
    _, group = torch.unique_consecutive(group_ids, return_inverse=True)
    groups = int(group[-1]) + 1
    first = rank() * groups // world_size()
    behind = max((rank() + 1) * groups // world_size(), first + 1)
    return ((group >= first) & (group < behind)).nonzero().squeeze(1)


def merge_shards(shares: list[Any], rows: list[Tensor]) -> Any:
    """The ranks' shares of a batch as the whole batch.

    Args:
        shares: of every rank the same: tensors [n, ...], lists of length n, None, or a dataclass of these.
        rows: of every rank its rows' places in the batch, [n] int64.

    Returns:
        The same, of all rows in their order. Narrower tensors are padded on the right with zeros.
    """
    first = shares[0]
    if first is None or len(shares) == 1:
        return first
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return type(first)(**{name: merge_shards([getattr(each, name) for each in shares], rows) for name in names})
    size = max(int(each.max()) for each in rows) + 1
    if isinstance(first, list):
        items: list[Any] = [None] * size
        for share, index in zip(shares, rows, strict=True):
            for place, item in zip(index.tolist(), share, strict=True):
                items[place] = item
        return items
    width = [max(each.shape[1] for each in shares)] if first.dim() > 1 else []
    whole = first.new_zeros(size, *width)
    for share, index in zip(shares, rows, strict=True):
        if width:
            whole[index, : share.shape[1]] = share
        else:
            whole[index] = share
    return whole


def local_rows(rows: list[Tensor]) -> Tensor:
    """Where this rank keeps what it keeps of each row of the batch, [B] int64; -1 where another rank has it.

    Args:
        rows: as in `merge_shards`. A row that several ranks have sampled is held by the last of them.
    """
    holder = torch.empty(max(int(each.max()) for each in rows) + 1, dtype=torch.long)
    for number, index in enumerate(rows):
        holder[index] = number
    place = torch.full_like(holder, -1)
    place[rows[rank()]] = torch.arange(len(rows[rank()]))
    return torch.where(holder == rank(), place, -1)


def update_rows(lengths: Tensor, trunk_rows: Tensor | None) -> Tensor:
    """The rows of a minibatch that this rank learns from, [n] int64 on the CPU: all in one process, else maybe none.

    Args:
        lengths: [B] int64 on the CPU, tokens of each row; the longest are assigned first, there and back again.
        trunk_rows: as in Experience; rows then stay where their states are.
    """
    if trunk_rows is not None:
        return (trunk_rows >= 0).nonzero().squeeze(1).cpu()
    if world_size() == 1:
        return torch.arange(len(lengths))
    turn = torch.arange(len(lengths)) % (2 * world_size())
    mine = (turn == rank()) | (turn == 2 * world_size() - 1 - rank())
    return torch.argsort(lengths, descending=True, stable=True)[mine]
