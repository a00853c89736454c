"""Folders that are complete or absent: written beside their place, hashed, then published by one rename."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import nn

from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.atomic_files import WRITING, publish_folder, why_invalid
from chatrlhf.runtime.collectives import barrier, gather_results, is_main
from chatrlhf.runtime.disk_space import check_room


@dataclass
class CheckpointStore:
    """The checkpoints of one stage: ``folder/step-NNNNNN``, the newest ``keep`` of them."""

    folder: Path
    keep: int
    warn: Callable[[str], None]

    def publish(self, step: int, write: Callable[[Path], None], by_all: Callable[[Path], None] | None = None) -> Path:
        """Publish what is written as `publish_folder` has it, then drop the oldest beyond ``keep``."""
        path = publish_folder(self.folder / f"step-{step:06d}", write, by_all)
        if is_main():
            for old in self._steps()[: -self.keep]:
                shutil.rmtree(old)
        return path

    def newest(self) -> tuple[int, Path] | None:
        """The newest valid checkpoint as (step, path); None where none was ever published.

        Raises:
            CheckpointError: there are checkpoints and none is valid.
        """
        candidates = self._steps()
        problem = ""
        for path in reversed(candidates):
            problem = why_invalid(path) or ""
            if not problem:
                return _step_of(path), path
            self.warn(f"checkpoint {path} is damaged ({problem}); trying the one before")
        if candidates:
            raise CheckpointError(
                f"{self.folder}: none of its {len(candidates)} checkpoints is valid (last: {problem}); "
                "restore one, or start again without --resume"
            )
        return None

    def _steps(self) -> list[Path]:
        """Oldest first, by number: beyond step 999,999 names have more digits, and text would sort them first."""
        folders = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted((path for path in folders if _number_of(path).isdecimal()), key=_step_of)


def _number_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("step-")


def _step_of(checkpoint: Path) -> int:
    return int(_number_of(checkpoint))


@dataclass
class StageFiles:
    """Where a stage on TRL's trainer keeps what it writes, and whether it continues from there."""

    stage: str
    store: CheckpointStore
    scratch: Path
    resume: bool
    record: Callable[[], None]  # writes into the manifest that the stage has begun, and from what
    skipped_limit: int = 3  # steps in a row that may not be taken

    @cached_property
    def newest(self) -> tuple[int, Path] | None:
        """The checkpoint to continue from as (step, path); None without --resume, or where there is none.

        Raises:
            CheckpointError: there are checkpoints and none is valid.
        """
        return self.store.newest() if self.resume else None

    def begin(self, model: nn.Module) -> None:
        """To be called when all other checks are done, before the first file is written.

        Args:
            model: what is trained, to be compared with the room on the disk.
        """
        gather_results(lambda: self._make_room(model) if is_main() else None)
        self.record()
        barrier()

    def _make_room(self, model: nn.Module) -> None:
        """Remove what a kill or a full disk has left half written, and see whether the rest is enough."""
        for leftover in (self.scratch, *self.store.folder.glob(f"{WRITING}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        check_room(self.scratch.parent.parent, self.stage, model, self.store.keep, self.resume, self.store.warn)
