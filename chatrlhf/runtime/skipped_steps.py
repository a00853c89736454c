"""Steps that were not taken because something in them was not finite: said, kept in a file, counted.

One such step harms nothing: no weight, no moment and no schedule has moved. Several in a row mean that the run has
failed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatrlhf.errors import DivergedError
from chatrlhf.runtime.atomic_files import PRIVATE, write_atomically
from chatrlhf.runtime.collectives import is_main

FOLDER = "skipped"
KEY = "guards_config.skipped_steps"


@dataclass
class SkippedSteps:
    """A stage's steps that were not taken.

    Args:
        folder: of the stage's checkpoints; batches are kept in ``skipped/`` there. None: nowhere.
        limit: so many in a row end the run.
        remedy: what to change then.
    """

    stage: str
    folder: Path | None
    limit: int
    warn: Callable[[str], None]
    remedy: str
    total: int = 0
    in_a_row: int = 0

    def skip(
        self,
        step: int,
        why: str,
        where: str | None,
        rows: Sequence[Mapping[str, Any]],
        error: Exception | None = None,
        counts: bool = True,
    ) -> None:
        """Keep the batch of a step that was not taken.

        Args:
            why: what was not finite.
            where: the module or weight that it began with, where that is known.
            rows: the batch, as JSON has it; ``row`` is a row's number, from 1.
            error: what to raise in place of a DivergedError.
            counts: whether it was all of a step; False: a part, and the rest was taken.

        Raises:
            DivergedError: it was the last one that is borne.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + counts
        place = f" ({where} is the first that is not finite)" if where else ""
        line = f"{self.stage} step {step}: {why}{place}; rows {_listed([row['row'] for row in rows])}"
        if self.folder is not None:
            path = self.folder / FOLDER / f"step-{step:06d}.json"
            if is_main():
                path.parent.mkdir(parents=True, exist_ok=True)
                facts = {"stage": self.stage, "step": step, "why": why, "where": where, "rows": list(rows)}
                write_atomically(path, json.dumps(facts, ensure_ascii=False, indent=1) + "\n", PRIVATE)
            line += f", which are in {path}"
        if not counts:
            self.warn(f"{line}; nothing is learned from these")
            return
        if self.in_a_row < self.limit:
            self.warn(f"{line}; the step is not taken ({self.in_a_row} in a row, {self.limit} end the run)")
            return
        if error is not None:
            raise error
        raise DivergedError(
            f"{line}; {self.in_a_row} steps in a row were not taken ({KEY}), and none has changed a weight. "
            f"{self.remedy}, then use --resume"
        )

    def taken(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    """Some numbers of rows for a line."""
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
