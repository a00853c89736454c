"""Folders and files that are complete or absent: written beside their place, hashed, then published by one rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chatrlhf.errors.boundary import doing
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.file_hash import sha256_of
from chatrlhf.runtime.links import leads_out
from chatrlhf.runtime.watchdog import beat

CONTENTS = "contents.json"
WRITING = ".writing-"
REPLACED = ".replaced-"
PRIVATE = 0o600  # permissions of what only its owner is to read


def publish_folder(target: Path, write: Callable[[Path], None], by_all: Callable[[Path], None] | None = None) -> Path:
    """Fill a folder beside ``target``, list its files with size and SHA-256, and rename it to ``target``.

    A kill at any moment leaves either the old ``target`` (or none) or the new one, and at most a folder with
    a dot in front, which the next publication clears away. All ranks call this, and each leaves when the folder is in
    its place.

    Args:
        write: what rank 0 puts into the folder it is given.
        by_all: what every rank puts there before.
    """
    from chatrlhf.runtime.collectives import barrier, is_main  # brings torch, which small files can do without

    writing = target.parent / f"{WRITING}{target.name}"
    beat(f"writing {target}")
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
            except BaseException:
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
    reached("publish.between_renames", target)
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
        return next(filter(None, (_why_other(folder, name, what) for name, what in contents.items())), None)
    except FileNotFoundError:
        return f"{CONTENTS} is missing"
    except (ValueError, RecursionError):  # neither text nor JSON, or lists that are too deep
        return f"{CONTENTS} is not valid JSON"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"


def _why_other(folder: Path, name: str, expected: Any) -> str | None:
    """What tells a file from the one that was published."""
    path = folder / name
    if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
        return f"{CONTENTS} says nothing of {name}"
    if leads_out(path, folder):
        return f"{CONTENTS} names {name}, which is not in the folder"
    if not path.is_file():  # no folder, and no device either, which would have no end
        return f"{name} is missing" if not path.exists() else f"{name} is no file"
    if path.stat().st_size != expected["bytes"]:
        return f"{name} has {path.stat().st_size} bytes, expected {expected['bytes']}"
    return None if _describe(path) == expected else f"{name} does not have its SHA-256"


def write_atomically(path: Path, text: str, mode: int = 0o666) -> None:
    """As `replace_file`; what the disk refuses is one line that names the file."""
    with doing("writing", path):
        replace_file(path, text, mode)


def replace_file(path: Path, text: str, mode: int = 0o666) -> None:
    """Replace a file by one rename: a kill at any moment leaves the old one or the new one.

    Args:
        mode: its permissions, less the umask; `PRIVATE` for what people say to a model.

    Raises:
        OSError: it cannot be written.
    """
    beside = path.with_name(f"{WRITING}{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.unlink(missing_ok=True)  # a kill's, or a link that someone has put there
    with open(
        beside, "x", encoding="utf-8", newline="\n", opener=lambda name, flags: os.open(name, flags, mode)
    ) as file:
        file.write(text)
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
