"""Several files of one command, published together: killed anywhere, the same command can simply be run again.

    .writing-<name>-<n>/    the files, whole before any of them has its place
    .publishing-<name>      the record: which files are moved from there, and what they replace

The record is the commit: written by one rename, it stands until the last file is in its place. A command that is killed
before has changed nothing that a user sees; one that is killed later is finished by the next call of it. What the
record lists and no one has changed since is the command's own, and may be written anew.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from chatrlhf.errors import DataError
from chatrlhf.runtime.atomic_files import WRITING, replace_file
from chatrlhf.runtime.file_hash import sha256_of
from chatrlhf.runtime.links import leads_out
from chatrlhf.runtime.run_lock import RunLock

PUBLISHING = ".publishing-"
Write = Callable[[Path], Any]  # writes the file whose path it is given


class Publication:
    """A command's hold on the files that it is about to write in one folder, by lock.

    On entering, the folder is made where it is missing, locked, and what a killed call of the same command has left is
    finished or removed.

    Args:
        folder: of the files, which may be in folders within it.
        name: the command's, so that others in the same folder keep their files.
        key: the option that names the folder, for errors.
        file: name of the one file that is locked; "": the whole folder.

    Raises:
        LockedError: another process writes there.
        DataError: it cannot be written there; or a file that a killed call was about to write has been put there, or
            changed, by somebody since.
    """

    def __init__(self, folder: Path, name: str, key: str, file: str = "") -> None:
        self.folder, self._key = folder, key
        self._scratch, self._record = f"{WRITING}{name}-", folder / f"{PUBLISHING}{name}"
        self._lock = RunLock(folder, key, file)
        self._own: set[Path] = set()
        self._made: list[Path] = []

    def __enter__(self) -> Publication:
        with self._explained():
            self._made = [each for each in (self.folder, *self.folder.parents) if not each.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._recover()
            except BaseException:
                self._lock.release()
                raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.release()
        if kind is not None:
            for folder in self._made:  # a command that fails leaves no folder where there was none
                with suppress(OSError):
                    folder.rmdir()

    def in_the_way(self, files: Iterable[Path]) -> list[Path]:
        """Those that are there, and that no killed call of this command has written."""
        return [path for path in files if os.path.lexists(path) and path not in self._own]

    def publish(self, files: Mapping[Path, Write], force: bool = False, order: list[Path] | None = None) -> None:
        """Write all files, then bring all to their places.

        Args:
            files: paths in the folder, and what writes each.
            force: overwrite what is there.
            order: in which they come to their places; None: in which they are written.

        Raises:
            DataError: a file was put there in the meantime, and ``force`` is not given, or something cannot be written;
                nothing is changed, or the next call finishes it.
        """
        with self._explained():
            record = self._written(files, force)
            if order is not None:
                record["moves"] = {name: record["moves"][name] for name in map(self._name, order)}
            replace_file(self._record, json.dumps(record, indent=1) + "\n")
            self._move(record)
            self._clear()
            self._record.unlink()  # at last: until here a killed call's files are known as its own

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.folder))

    def _written(self, files: Mapping[Path, Write], force: bool) -> dict[str, Any]:
        """Write the files beside their places; returns the record of what is to be moved."""
        scratch = Path(tempfile.mkdtemp(prefix=self._scratch, dir=self.folder))
        moves: dict[str, Any] = {}
        try:
            for path, write in files.items():
                name = self._name(path)
                beside = scratch / name
                beside.parent.mkdir(parents=True, exist_ok=True)
                write(beside)
                _sync(beside)
                moves[name] = {"sha256": sha256_of(beside), "replaces": _hash(path)}
            if not force and (there := self.in_the_way(files)):
                raise DataError(f"{there[0]} was put there in the meantime; move it away, and run the command again")
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        return {"from": scratch.name, "moves": moves}

    def _recover(self) -> None:
        """Finish the moves of a killed call, if there are any, and remove what was written and never published."""
        if (record := _read(self._record)) is not None:
            self._move(record)
            moved = ((self.folder / name, what["sha256"]) for name, what in record["moves"].items())
            self._own = {path for path, sha256 in moved if _hash(path) == sha256}
        self._clear()

    def _move(self, record: dict[str, Any]) -> None:
        for name, what in record["moves"].items():
            beside, path = self.folder / record["from"] / name, self.folder / name
            if not beside.is_file():  # it has its place already
                continue
            if _hash(path) not in (what["replaces"], what["sha256"]):
                raise DataError(
                    f"{path} was changed after a call of this command was killed that was about to write it; move the "
                    "file away, and run the command again"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(beside, path)
            _sync(path.parent)

    def _clear(self) -> None:
        for leftover in self.folder.glob(f"{self._scratch}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.folder}: it cannot be written ({error}); give another {self._key}") from None


def _read(path: Path) -> dict[str, Any] | None:
    """A record that this module has written, None where there is none; it names no place outside of its folder."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("moves"), dict) or not _is_safe(record, path.parent):
        raise DataError(f"{path}: this is no record of files to be moved; remove it, and run the command again")
    return record


def _is_safe(record: dict[str, Any], folder: Path) -> bool:
    scratch, moves = record.get("from"), record["moves"]
    return (
        isinstance(scratch, str)
        and scratch.startswith(WRITING)
        and os.sep not in scratch
        and not any(leads_out((folder / name).parent, folder) for name in moves)
        and all(isinstance(what, dict) and {"sha256", "replaces"} <= what.keys() for what in moves.values())
    )


def _hash(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
