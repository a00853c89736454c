"""How much of sampled text is said again: distinct n-grams of a batch, repeated n-grams within a reply."""

from __future__ import annotations

import torch
from torch import Tensor

MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator (The Art of Computer Programming 2, 3.3.4): mixes well


def distinct_ngrams(ids: Tensor, mask: Tensor, n: int = 2) -> float:
    """Different n-grams as a share of all n-grams of a batch (Li et al. 2016, "A Diversity-Promoting Objective
    Function", section 5.2: distinct-n); 1 where there is none.

    Args:
        ids: [B, R] int64.
        mask: [B, R] bool, a prefix of ones in each row.
    """
    grams, valid = _hashed(ids, mask, n)
    found = grams[valid]
    return len(found.unique()) / len(found) if len(found) else 1.0


def repeated_ngrams(ids: Tensor, mask: Tensor, n: int = 4) -> float:
    """Share of a reply's n-grams that it has said before, over all replies with two or more; 0 where there is none.

    It is seq-rep-n of Welleck et al. 2020, "Neural Text Generation With Unlikelihood Training", section 6.

    Args:
        ids, mask: as of `distinct_ngrams`.
    """
    grams, valid = _hashed(ids, mask, n)
    valid &= valid.sum(dim=1, keepdim=True) > 1
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(grams)
    found = _mixed(grams, rows)[valid]
    return 1 - len(found.unique()) / len(found) if len(found) else 0.0


def _hashed(ids: Tensor, mask: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A number for the n-gram that begins at each place, equal for equal ones, and whether there is one."""
    width = max(ids.shape[1] - n + 1, 0)
    grams = torch.zeros(len(ids), width, dtype=torch.int64, device=ids.device)
    for offset in range(n):
        grams = _mixed(grams, ids[:, offset : offset + width])
    return grams, mask[:, n - 1 :].clone() if width else mask[:, :0].clone()


def _mixed(number: Tensor, other: Tensor) -> Tensor:
    """A number of 64 bits made of two; products wrap around."""
    return (number ^ (number >> 29)) * MULTIPLIER + other + 1
