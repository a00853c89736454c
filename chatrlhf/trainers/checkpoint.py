"""Folders that are complete or absent: written beside their place, hashed, then published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from chatrlhf.boundary import doing
from chatrlhf.data.files import sha256_of
from chatrlhf.distributed import barrier, gather_results, is_main, world_size
from chatrlhf.errors import CheckpointError
from chatrlhf.sharding.environment import Sharding
from chatrlhf.trainers.disk_space import check_room

CONTENTS = "contents.json"
SHARDING = "sharding.json"  # beside states that lie as they were dealt out
WRITING = ".writing-"
REPLACED = ".replaced-"


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
    """Where a stage on TRL's trainer keeps what it writes, and whether it goes on from there."""

    stage: str
    store: CheckpointStore
    scratch: Path
    resume: bool
    record: Callable[[], None]  # writes into the manifest that the stage has begun, and from what

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


def note_sharding(folder: Path, sharding: Sharding) -> None:
    """Write down how the states in a checkpoint are dealt out, where they are."""
    if sharding is not None:
        (folder / SHARDING).write_text(json.dumps(_described(sharding)) + "\n", encoding="utf-8")


def check_sharding(folder: Path, sharding: Sharding) -> None:
    """Refuse a checkpoint whose states were dealt out in another way: DeepSpeed cannot deal them out anew.

    Raises:
        CheckpointError: it says how it was.
    """
    path = folder / SHARDING
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    wanted = _described(sharding) if sharding is not None else None
    if there != wanted:
        one, other = (f"{each['by']} in {each['processes']} processes" if each else "whole" for each in (there, wanted))
        raise CheckpointError(
            f"{folder}: its states were written {one}, and this run has them {other}; resume with the launch and the "
            "configuration that it was written by, or start again without --resume"
        )


def _described(sharding: Sharding) -> dict[str, Any]:
    return {"by": str(sharding), "processes": world_size()}


def publish_folder(target: Path, write: Callable[[Path], None], by_all: Callable[[Path], None] | None = None) -> Path:
    """Fill a folder beside ``target``, list its files with size and SHA-256, and rename it to ``target``.

    A kill at any moment leaves either the old ``target`` (or none) or the new one, and at most a folder with
    a dot in front, which the next publication clears away. All ranks call this, and each leaves when the folder is in
    its place.

    Args:
        write: what rank 0 puts into the folder it is given.
        by_all: what every rank puts there before.
    """
    writing = target.parent / f"{WRITING}{target.name}"
    barrier()
    with doing("writing the folder", target):
        if is_main():
            _begin(target, writing)
        if by_all is not None:
            barrier()
            by_all(writing)
            barrier()
        if is_main():
            try:
                write(writing)
                _finish(target, writing)
            except Exception:
                shutil.rmtree(writing, ignore_errors=True)  # half of it would only fill the disk
                raise
    barrier()
    return target


def _begin(target: Path, writing: Path) -> None:
    replaced = _replaced(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if replaced.exists() and not target.exists():  # killed between the two renames of `_finish`
        replaced.rename(target)
    for leftover in (writing, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    writing.mkdir()


def _finish(target: Path, writing: Path) -> None:
    contents = {str(path.relative_to(writing)): _describe(path) for path in _files(writing)}
    text = json.dumps(contents, indent=2, sort_keys=True) + "\n"
    (writing / CONTENTS).write_text(text, encoding="utf-8")
    for path in [*_files(writing), writing]:
        _sync(path)
    replaced = _replaced(target)
    if target.exists():
        target.rename(replaced)
    writing.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(target: Path) -> Path:
    return target.parent / f"{REPLACED}{target.name}"


def why_invalid(folder: Path) -> str | None:
    """What is wrong with a published folder; None where every file has the size and hash it was published with."""
    listing = folder / CONTENTS
    try:
        contents = json.loads(listing.read_text(encoding="utf-8"))
        if not isinstance(contents, dict) or not contents:
            return f"{CONTENTS} lists no files"
        return next(filter(None, (_why_other(folder / name, name, what) for name, what in contents.items())), None)
    except FileNotFoundError:
        return f"{CONTENTS} is missing"
    except (ValueError, RecursionError):  # neither text nor JSON, or lists that are too deep
        return f"{CONTENTS} is not valid JSON"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _why_other(path: Path, name: str, expected: Any) -> str | None:
    """What tells a file from the one that was published."""
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        return f"{CONTENTS} says nothing of {name}"
    if not path.exists():
        return f"{name} is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    return None if _describe(path) == expected else f"{name} does not have its SHA-256"


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file by one rename."""
    beside = path.with_name(f"{WRITING}{path.name}")
    with doing("writing", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        _sync(beside)
        os.replace(beside, path)


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _sync(path: Path) -> None:
    """Bring a file, or a folder's entries, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
