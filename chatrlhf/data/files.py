"""Files of rows: JSON, JSONL, CSV, Parquet and plain text, as they are or compressed by gzip.

A user's are only ever read. Of JSONL, CSV and Parquet no more than a part is in memory at a time. All who read a file
find the same faults in it: training, mixtures and `chatrlhf data` read by `read_rows` or `open_rows`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from chatrlhf.data.csv_rows import csv_rows
from chatrlhf.data.file_errors import explained
from chatrlhf.data.file_signatures import GZIP, HEAD, refuse_foreign
from chatrlhf.data.gzip_reader import bounded_gzip
from chatrlhf.data.json_row import Row
from chatrlhf.data.json_rows import MARK, JsonLines, decoded, is_by_line, lines_of, list_of
from chatrlhf.data.parquet_rows import parquet_rows
from chatrlhf.errors import DataError
from chatrlhf.runtime.atomic_files import replace_file

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def holds_rows(path: Path) -> bool:
    """Whether a file is of a kind that `read_rows` reads, by its name."""
    return path.is_file() and _kind(path) in SUFFIXES


Faults = Callable[[DataError], None]


def read_rows(path: Path, faults: Faults | None = None) -> Iterator[Row]:
    """The rows of a file as they are asked for; of a text file one, with field ``text``.

    Args:
        faults: is given what is wrong with a row that cannot be read, and the next is read.

    Raises:
        DataError: with file and row, where a row cannot be read and no one asked for its fault; or the file itself
            cannot be read.
    """
    with explained(path):
        for row in _read(path):
            if isinstance(row, Row):
                yield row
            elif faults is None:
                raise row
            else:
                faults(row)


def open_rows(path: Path) -> Sequence[Row]:
    """The rows of a file in any order; those of a JSONL or text file stay on the disk. Raises DataError."""
    with explained(path):
        if _is_compressed(path) or not path.is_file() or _kind(path) in (".csv", ".parquet"):
            return list(read_rows(path))
        if _kind(path) == ".txt":
            return WholeText(path)
        with _opened(path) as file:
            by_line = is_by_line(file, path, _kind(path))
        return JsonLines(path) if by_line else list(read_rows(path))


def write_rows(path: Path, rows: Iterable[dict[str, Any]], mode: int = 0o666) -> None:
    """Write a file of rows, complete or not at all: JSONL by its name, or else a JSON list with a row a line.

    Args:
        mode: the file's permissions, less the umask.

    Raises:
        OSError: it cannot be written.
    """
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    replace_file(path, text, mode)


class WholeText(Sequence[Row]):
    """The one row of a text file, read when it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Row:
        if index != 0:
            raise IndexError(index)
        return next(read_rows(self.path))


def _read(path: Path) -> Iterator[Row | DataError]:
    """Rows, and instead of one that cannot be read what is wrong with it."""
    kind = _kind(path)
    with _opened(path) as file:
        if kind == ".parquet":
            if _is_compressed(path):
                raise DataError(f"{path}: Parquet is not read through gzip; unpack it (it is compressed inside)")
            yield from parquet_rows(path)
        elif kind == ".txt":
            yield Row({"text": decoded(file.read().removeprefix(MARK), str(path))}, str(path))
        elif kind == ".csv":
            yield from csv_rows(file, path)
        else:
            by_line = is_by_line(file, path, kind)
            file.seek(0)
            yield from (lines_of if by_line else list_of)(file, path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, uncompressed. Raises DataError where they are not what its name says."""
    with path.open("rb") as packed:
        if not _is_compressed(path):
            file: IO[bytes] = packed
        elif packed.read(len(GZIP)) not in (GZIP, b""):
            packed.seek(0)
            refuse_foreign(packed.read(HEAD), path, "")
            raise DataError(f"{path}: it cannot be read, since it is not compressed by gzip; remove .gz from its name")
        else:
            packed.seek(0)
            file = bounded_gzip(packed, str(path))
            if file.read(len(GZIP)) == GZIP:
                raise DataError(f"{path}: it is compressed by gzip twice; unpack it once")
            file.seek(0)
        refuse_foreign(file.read(HEAD), path, _kind(path))
        file.seek(0)
        yield file


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def _kind(path: Path) -> str:
    """The suffix that says how a file is read, in small letters."""
    return Path(path.name.lower().removesuffix(".gz")).suffix
