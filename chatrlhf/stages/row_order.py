"""In which order a stage on TRL's trainers sees its rows: a function of seed and epoch alone.

So a run that is resumed continues with the batches that it would have had, and every rank knows all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from chatrlhf.data.epochs import Epochs
from chatrlhf.data.row_sampler import RowOrder

# Batches among whose rows those of similar length are put together; as transformers' LengthGroupedSampler has it, no
# more than a quarter of an epoch's. Without such windows a batch would have the same rows in every epoch.
WINDOW = 50
FEWEST_WINDOWS = 4


class EpochOrder(RowOrder):
    """The rows of an epoch in the order in which they are seen; ``batch_size`` in succession are a batch.

    Args:
        epochs: which rows each epoch sees.
        batch_size: rows of an optimizer step, of all ranks together.
        lengths: tokens of each row, by its number; given, batches are of rows of similar length (see `by_length`).
    """

    def __init__(self, epochs: Epochs, batch_size: int, seed: int, lengths: NDArray[np.int64] | None = None) -> None:
        super().__init__(batch_size)
        self.epochs, self.seed, self.lengths = epochs, seed, lengths
        self.batched_by = batch_size  # the batch size that orders the epoch which is resumed

    def __len__(self) -> int:
        return self.epochs.size

    def of(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = self.epochs.of(epoch)[torch.randperm(len(self), generator=generator).numpy()]
        if self.lengths is not None:
            size = self.batched_by if self.resumes_inside(epoch) else self.batch_size
            order = by_length(order, self.lengths, size, generator)
        return order.tolist()

    def state_dict(self) -> dict[str, Any]:
        within = self.resumes_inside(self.seen.epochs)
        return super().state_dict() | {"batched_by": self.batched_by if within else self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.batched_by = state["batched_by"]


def by_length(
    order: NDArray[np.int64], lengths: NDArray[np.int64], batch_size: int, generator: torch.Generator
) -> NDArray[np.int64]:
    """Rows in a random order, put so that those of a batch are of similar length and little of it is padding.

    Rows are sorted within windows of some batches, and then the batches are shuffled: steps do not go from long rows to
    short ones. The batch with the longest row comes first, so that memory that does not suffice shows at once. Within
    a batch the longest row comes first, so that microbatches, too, are of similar rows. What fills no batch stays at
    the end.

    Args:
        order: numbers of rows, [N], in a random order.
        lengths: tokens of each row by its number.
    """
    order = order.copy()
    longest = lengths[order].argmax()
    order[[0, longest]] = order[[longest, 0]]
    batches = len(order) // batch_size
    window = min(WINDOW, -(-batches // FEWEST_WINDOWS)) * batch_size
    whole, rest = order[: batches * batch_size], order[batches * batch_size :]
    windows = [whole[start : start + window] for start in range(0, len(whole), max(window, 1))]
    grouped = [_longest_first(each, lengths).reshape(-1, batch_size) for each in windows]
    if not grouped:
        return _longest_first(rest, lengths)
    of_batch = np.concatenate(grouped)
    shuffled = 1 + torch.randperm(batches - 1, generator=generator).numpy()
    return np.concatenate([of_batch[0], of_batch[shuffled].reshape(-1), _longest_first(rest, lengths)])


def _longest_first(rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return rows[np.argsort(-lengths[rows], kind="stable")]  # equals stay in their random order


def widths(dataset: Any, *columns: str) -> NDArray[np.int64]:
    """Tokens of each row, [rows]: of its longest column, for a batch pads all of them alike."""
    return np.max([[len(ids) for ids in dataset[column]] for column in columns], axis=0)
