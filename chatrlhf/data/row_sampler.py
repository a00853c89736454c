"""Sampler that can be resumed: the order of an epoch's rows, and how many of them training has seen.

Progress is counted in rows, not in batches, so that a run can be resumed with another batch size and still sees each
row of the epoch it was in once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from chatrlhf.errors import CheckpointError


class Seen(NamedTuple):
    """Whole epochs, and rows of the one that follows them."""

    epochs: int = 0
    rows: int = 0


class RowOrder(Sampler[int]):
    """Numbers of rows, in the order in which they are seen; ``batch_size`` in succession are a batch."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.epoch = 0
        self.seen = self.resumed_at = Seen()

    def of(self, epoch: int) -> Sequence[int]:
        """The rows of an epoch (0 = first) in their order, [len(self)]."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Rows of an epoch."""
        raise NotImplementedError

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, and by accelerate's loader."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of the epoch. Of one that is resumed: a batch of place holders, which the trainer skips without
        reading its rows (that is how it learns that it resumes), then the rows that are left."""
        rows = self.of(self.epoch)
        if self.resumes_inside(self.epoch):
            yield from repeat(0, self.batch_size)
            rows = rows[self.resumed_at.rows :]
        yield from rows

    def resumes_inside(self, epoch: int) -> bool:
        """Whether an earlier run has seen a part of this epoch."""
        return epoch == self.resumed_at.epochs and self.resumed_at.rows > 0

    def rows_left(self, epoch: int) -> int:
        """Rows of an epoch that this run sees."""
        return len(self) - (self.resumed_at.rows if self.resumes_inside(epoch) else 0)

    def steps_left(self, epochs: int) -> int:
        """Optimizer steps from where the run was resumed to the end of so many epochs."""
        return sum(-(-self.rows_left(epoch) // self.batch_size) for epoch in range(self.resumed_at.epochs, epochs))

    def advance(self) -> None:
        """Count one optimizer step's rows as seen."""
        epochs, rows = self.seen
        rows = min(rows + self.batch_size, len(self))
        self.seen = Seen(epochs + 1, 0) if rows == len(self) else Seen(epochs, rows)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds of it, as JSON."""
        return {"epochs": self.seen.epochs, "rows": self.seen.rows, "rows_of_an_epoch": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            CheckpointError: the run stopped inside an epoch, and its rows are not the ones that they were.
        """
        if state["rows"] and state["rows_of_an_epoch"] != len(self):
            raise CheckpointError(
                f"--resume: an epoch had {state['rows_of_an_epoch']:,} rows, {state['rows']:,} of which were seen, and "
                f"now has {len(self):,}; restore the data and the keys that select rows, or start again without "
                "--resume"
            )
        self.seen = self.resumed_at = Seen(state["epochs"], state["rows"])

    def resume_behind(self, steps: int) -> None:
        """Continue behind so many optimizer steps of this batch size: checkpoints of earlier versions hold no more."""
        epochs, rest = divmod(steps, -(-len(self) // self.batch_size))
        self.seen = self.resumed_at = Seen(epochs, rest * self.batch_size)
