"""SHA-256 of a file, each content read once in a process."""

from __future__ import annotations

import hashlib
from pathlib import Path

_known: dict[tuple[int, ...], str] = {}  # by what tells a file's content from another's; a rename changes none of it


def sha256_of(path: Path) -> str:
    """Of a file's bytes, read a part at a time."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    if state.st_ino and key in _known:
        return _known[key]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    _known[key] = digest.hexdigest()
    return _known[key]
