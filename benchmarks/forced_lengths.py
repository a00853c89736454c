"""Responses of given lengths from transformers' `generate`, as `ours.replay_lengths` gives them to this package."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor


class ForcedLengths(LogitsProcessor):
    """Rows say words only until their length; a row that is shorter than the limit ends with EOS.

    `generate` continues to the longest row all the same, padding those that have ended, as it always does.

    Args:
        lengths: response tokens of each row, EOS included.
        limit: a row of this length is cut there and needs no EOS.
        never: ids that no row may draw, such as the pad token.
    """

    def __init__(self, lengths: list[int], limit: int, prompt: int, eos: int, never: tuple[int, ...] = ()) -> None:
        self.lengths, self.limit, self.prompt, self.eos = torch.tensor(lengths), limit, prompt, eos
        self.forbidden = torch.tensor(sorted({eos, *never}))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.prompt
        scores = scores.index_fill(1, self.forbidden, -torch.inf)
        ends = (self.lengths == position + 1) & (self.lengths < self.limit)
        scores[ends] = -torch.inf
        scores[ends, self.eos] = 0.0
        return scores
