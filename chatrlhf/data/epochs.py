"""Which rows each epoch sees, where that are not always the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatrlhf.errors import DataError


@dataclass(frozen=True)
class Epochs:
    """Of each epoch the numbers of the rows that it sees, [``size``], some more than once.

    All epochs see as many, so that the number of steps is known beforehand. Behind the last of them the first begins
    again.
    """

    rows: tuple[NDArray[np.int64], ...]

    @staticmethod
    def of_all(rows: int) -> Epochs:
        """Every epoch sees each of ``rows`` rows once."""
        return Epochs((np.arange(rows),))

    @property
    def size(self) -> int:
        """Rows that an epoch sees."""
        return len(self.rows[0])

    def of(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch (0 = first), in no particular order."""
        return self.rows[epoch % len(self.rows)]

    def seen(self) -> NDArray[np.int64]:
        """The rows of all epochs, each as often as it is seen."""
        return np.concatenate(self.rows)

    def only(self, kept: Sequence[int], source: str) -> Epochs:
        """The same where of all rows only some are left, which are numbered anew.

        Epochs that differ may lose rows in different numbers; the others then leave out as many as the one that has the
        fewest lacks.

        Args:
            kept: their numbers, in their order.
            source: what the rows were read from, for messages.

        Raises:
            DataError: nothing is left of an epoch.
        """
        numbers = np.full(1 + max(int(rows.max()) for rows in self.rows), -1)
        numbers[kept] = np.arange(len(kept))
        left = [numbers[rows][numbers[rows] >= 0] for rows in self.rows]
        fewest = min(map(len, left))
        if fewest == 0:
            raise DataError(
                f"{source}: no row of epoch {[len(rows) for rows in left].index(0) + 1} is short enough for the "
                "context; raise max_sequence_length, or take more of the datasets (fraction, size)"
            )
        return Epochs(tuple(rows[:fewest] for rows in left))
