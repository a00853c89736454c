"""Which rows share a forward: of similar length, so that little is computed on padding."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# What one more forward and backward costs besides its tokens, in tokens. Far from exact and need not be: with 64,
# 128 or 256 the embedded default's update took the same time within 4 %.
OVERHEAD = 128


def cut_by_length(lengths: Tensor, rows_at_longest: int, overhead: int = OVERHEAD) -> list[Tensor]:
    """Cut rows into microbatches with the least padding, each at most as large as ``rows_at_longest`` longest rows.

    Rows are sorted by length; where to cut is found exactly, by dynamic programming over

        cost(first i rows) = min over j < i of cost(first j) + (i - j) * longest(j..i) + overhead

    Args:
        lengths: [B] int64, real tokens of each row.
        rows_at_longest: rows of the longest length that fit into memory; shorter ones may be more.
        overhead: cost of a microbatch in tokens.

    Returns:
        Row indices, int64 on the CPU; every row stands in exactly one microbatch.
    """
    order = torch.argsort(lengths.cpu(), descending=True, stable=True)
    widths = lengths.cpu()[order].numpy().astype(np.float64)
    size, budget = len(widths), rows_at_longest * widths[0]
    cost, cut_at = np.zeros(size + 1), np.zeros(size + 1, dtype=np.int64)
    for end in range(1, size + 1):
        padded = (end - np.arange(end)) * widths[:end]
        candidates = np.where(padded <= budget, cost[:end] + padded + overhead, np.inf)
        cut_at[end] = candidates.argmin()
        cost[end] = candidates[cut_at[end]]
    pieces, end = [], size
    while end > 0:
        pieces.append(order[cut_at[end] : end])
        end = int(cut_at[end])
    return pieces[::-1]
