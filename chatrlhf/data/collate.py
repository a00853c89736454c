"""From conversations to token ids, and from rows of ids to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.types import PromptBatch

__all__ = ["Encoder", "pad_right", "prompt_batch"]  # the encoder is looked for here, beside what takes its ids


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged ids as [N, T] int64 and their mask [N, T] bool, padding on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask


def prompt_batch(
    ids_of: Sequence[Sequence[int]], prompts: Sequence[Prompt | str], pad_id: int, samples_per_prompt: int = 1
) -> PromptBatch:
    """Prompts, each repeated ``samples_per_prompt`` times in a row, left-padded.

    Args:
        ids_of: ids of each prompt.
        prompts: the same, as they stand in the data.
    """
    width = max(len(ids) for ids in ids_of)
    ids = torch.full((len(ids_of), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids_of), width), dtype=torch.bool)
    for i, row in enumerate(ids_of):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    group = torch.arange(len(ids_of))
    repeat = torch.repeat_interleave(group, samples_per_prompt)
    return PromptBatch(ids[repeat], mask[repeat], group[repeat], [Prompt.of(prompts[i]) for i in repeat.tolist()])
