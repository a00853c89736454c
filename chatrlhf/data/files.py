"""Files of rows: JSON, JSONL, CSV, Parquet and plain text, as they are or compressed by gzip.

A user's are only ever read. Of JSONL, CSV and Parquet no more than a part is in memory at a time.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from chatrlhf.data.row import Row, describe
from chatrlhf.errors import DataError

MARK = b"\xef\xbb\xbf"  # that some editors put before UTF-8


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def holds_rows(path: Path) -> bool:
    """Whether a file is of a kind that `read_rows` reads, by its name."""
    return path.is_file() and path.name.removesuffix(".gz").endswith(SUFFIXES)


Faults = Callable[[DataError], None]


def read_rows(path: Path, faults: Faults | None = None) -> Iterator[Row]:
    """The rows of a file as they are asked for; of a text file one, with field ``text``.

    Args:
        faults: is given what is wrong with a row that cannot be read, and the next is read.

    Raises:
        DataError: with file and row, where a row cannot be read and nobody asked for its fault; or the file itself
            cannot be read.
    """
    try:
        for row in _read(path):
            if isinstance(row, Row):
                yield row
            elif faults is None:
                raise row
            else:
                faults(row)
    except FileNotFoundError:
        raise DataError(f"{path}: the file does not exist; correct the path in the configuration") from None
    except IsADirectoryError:
        raise DataError(f"{path}: it is a folder; name the file in it") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: it cannot be read ({error}); copy it again") from None


def open_rows(path: Path) -> Sequence[Row]:
    """The rows of a file in any order; those of a JSONL or text file stay on the disk. Raises DataError."""
    if path.is_file() and _kind(path) == ".txt":
        return WholeText(path)
    if path.suffix == ".gz" or not path.is_file() or _kind(path) not in (".jsonl", ".json"):
        return list(read_rows(path))
    with path.open("rb") as file:
        by_line = path.suffix == ".jsonl" or _first_line(file)[1].lstrip()[:1] == b"{"
    return JsonLines(path) if by_line else list(read_rows(path))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of rows, complete or not at all: JSONL by its name, or else a JSON list with a row a line.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines) if path.suffix == ".jsonl" else "[\n" + ",\n".join(lines) + "\n]\n"
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", newline="\n")
    os.replace(part, path)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, read a part at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


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


class JsonLines(Sequence[Row]):
    """A JSONL file of which only the places of its lines are in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, numbers, place = [], [], 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.removeprefix(MARK).strip():
                    starts.append(place)
                    numbers.append(number)
                place += len(line)
        self.starts, self.numbers = np.array(starts, dtype=np.int64), np.array(numbers, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        with self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.readline().removeprefix(MARK)
        return _json_row(line, f"{self.path}, row {self.numbers[index]}")


def _read(path: Path) -> Iterator[Row | DataError]:
    """Rows, and in the place of one that cannot be read what is wrong with it."""
    kind = _kind(path)
    if kind == ".parquet":
        yield from _parquet(path)
        return
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        if kind == ".txt":
            yield Row({"text": _decoded(file.read().removeprefix(MARK), str(path))}, str(path))
        elif kind == ".csv":
            yield from _csv(file, path)
        else:
            skipped, first = _first_line(file)
            # A JSONL file by name, or by its first character: a JSON array starts with "[".
            if kind == ".jsonl" or first.lstrip()[:1] == b"{":
                yield from _lines(chain([b""] * skipped, [first], file), path)
            else:
                yield from _array(first + file.read(), path)


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


def _first_line(file: IO[bytes]) -> tuple[int, bytes]:
    """How many blank lines a file begins with, and the first that is not."""
    first, skipped = file.readline().removeprefix(MARK), 0
    while first and not first.strip():
        first, skipped = file.readline(), skipped + 1
    return skipped, first


def _csv(file: IO[bytes], path: Path) -> Iterator[Row | DataError]:
    lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    csv.field_size_limit(2**31 - 1)
    try:
        for number, values in enumerate(csv.DictReader(lines), start=1):
            # A line that is too long has a field without a name, one that is too short fields without a value.
            place = f"{path}, row {number}"
            if None in values or None in values.values():
                yield DataError(f"{place}: it has not as many fields as the first line has names")
            else:
                yield Row(values, place)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: broken CSV ({error}); correct the file") from None


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}, row {number}")
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: it cannot be read ({error}); copy it again") from None


def _lines(lines: Iterator[bytes], path: Path) -> Iterator[Row | DataError]:
    # Lines of bytes end at "\n" alone: a text may hold the other characters that end a line elsewhere.
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield _attempt(_json_row, line, f"{path}, row {number}")


def _json_row(line: bytes, place: str) -> Row:
    return Row.of(_parse(line.rstrip(b"\r\n"), place, place), place)


def _array(text: bytes, path: Path) -> Iterator[Row | DataError]:
    values = _parse(text, str(path), None) if text.strip() else []
    if not isinstance(values, list):
        raise DataError(f"{path}: expected a list of rows, got {describe(values)}")
    for number, value in enumerate(values, start=1):
        yield _attempt(Row.of, value, f"{path}, row {number}")


def _attempt(read: Callable[[Any, str], Row], value: Any, place: str) -> Row | DataError:
    try:
        return read(value, place)
    except DataError as error:
        return error


def _parse(text: bytes, place: str, row: str | None) -> Any:
    try:
        return json.loads(_decoded(text, place))
    except json.JSONDecodeError as error:
        place = row or f"{place}, line {error.lineno}"
        raise DataError(f"{place}, column {error.colno}: broken JSON ({error.msg}); correct the file") from None
    except (ValueError, RecursionError) as error:  # valid JSON that Python declines, such as a number of 5,000 digits
        raise DataError(f"{place}: cannot be read ({error}); correct the file") from None


def _decoded(text: bytes, place: str) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
