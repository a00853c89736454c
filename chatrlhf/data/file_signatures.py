"""Files that are not what their names say, known by their first bytes: archives, pointers, pages, other encodings."""

from __future__ import annotations

import re
from pathlib import Path

from chatrlhf.errors import DataError

HEAD = 64  # bytes that are looked at
GZIP = b"\x1f\x8b"
PARQUET = b"PAR1"

FOREIGN: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL), reason)
    for pattern, reason in (
        (
            rb"version https://git-lfs.github.com/spec",
            "it is a pointer of Git LFS and not the file itself; run `git lfs pull`",
        ),
        (rb"PK\x03\x04", "it is a zip archive; unpack it, and name the file in it"),
        (rb"\x1f\x8b", "it is compressed by gzip; let its name end with .gz"),
        (rb"BZh[1-9]1AY&SY", "it is compressed by bzip2; unpack it"),
        (rb"\xfd7zXZ\x00", "it is compressed by xz; unpack it"),
        (rb"\x28\xb5\x2f\xfd", "it is compressed by Zstandard; unpack it"),
        (rb"PAR1[\x00-\x08\x0e-\x1f]", "it is a Parquet file; let its name end with .parquet"),
        (rb"ARROW1\x00", "it is an Arrow file; save it as Parquet"),
        (rb"\xff\xfe|\xfe\xff|[^\x00]\x00|\x00[^\x00]", "it is not UTF-8 text, but UTF-16; save it as UTF-8"),
        (rb"[^\n]*\x00", "it is not text: there is a NUL byte in its beginning; name a text file, or copy it again"),
    )
)
PAGE = re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE)


def refuse_foreign(head: bytes, path: Path, kind: str) -> None:
    """Refuse a file that begins as files of another kind do.

    Args:
        head: its first `HEAD` bytes, uncompressed where its name ends with .gz.
        kind: its suffix, without .gz.

    Raises:
        DataError: with what it is and what to do.
    """
    if kind == ".parquet" and head.startswith(PARQUET):
        return
    for pattern, reason in FOREIGN:
        if pattern.match(head):
            raise DataError(f"{path}: {reason}")
    if kind != ".txt" and PAGE.match(head):
        raise DataError(f"{path}: it is a web page and not the file itself; download it again")
