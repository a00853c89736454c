"""Rows of JSON files: JSONL, an object a line, and JSON, a list of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from chatrlhf.config.strict_json import JsonFault, check_depth, collecting_decoder, explain, parse_row
from chatrlhf.data.file_errors import explained
from chatrlhf.data.json_row import Row, describe, names_of
from chatrlhf.errors import DataError

MARK = b"\xef\xbb\xbf"  # the byte-order mark that some editors put before UTF-8; also where files were joined
BLANK = re.compile(r"[ \t\r\n]*")
# Names under which a whole file's rows are put by those who wrap them in an object.
WRAPPERS = ("data", "rows", "train", "examples", "instances", "samples", "items", "records", "dataset")
ONE_A_LINE = "write a row a line (`jq -c` does) or a list of rows"


def is_by_line(file: IO[bytes], path: Path, kind: str) -> bool:
    """Whether a file holds an object a line: by its name, or by its first character.

    Args:
        kind: its suffix, without .gz.

    Raises:
        DataError: it is one object over several lines, or no JSON at all.
    """
    first, second = _next_line(file), _next_line(file)
    opening = first.lstrip()[:1]
    if kind not in (".jsonl", ".json") and opening not in (b"{", b"["):
        raise DataError(f"{path}: it is no JSON, and its name does not end with .csv, .parquet or .txt")
    if opening == b"{":
        _refuse_objects_over_lines(file, path, first, second)
    elif opening == b"[" and kind == ".jsonl" and not _is_whole(first) and second:
        raise DataError(f"{path}: it is a JSON list over several lines; let its name end with .json, or {ONE_A_LINE}")
    return kind == ".jsonl" or opening == b"{"


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
        with explained(self.path), self.path.open("rb") as file:
            file.seek(int(self.starts[index]))
            line = file.readline()
        return _line(line, f"{self.path}, row {self.numbers[index]}")


def lines_of(file: IO[bytes], path: Path) -> Iterator[Row | DataError]:
    """The rows of a JSONL file, and for one that cannot be read the error about it."""
    # Lines of bytes end at "\n" alone: a text may hold the other characters that end a line elsewhere.
    for number, line in enumerate(file, start=1):
        if line.removeprefix(MARK).strip():
            try:
                yield _line(line, f"{path}, row {number}")
            except DataError as error:
                yield error


def list_of(file: IO[bytes], path: Path) -> Iterator[Row | DataError]:
    """The rows of a JSON list, and for one that cannot be read the error about it.

    Raises:
        DataError: it is no list, or the text is broken.
    """
    text = decoded(file.read().removeprefix(MARK), str(path))
    try:
        for number, (value, fault) in enumerate(_items(text), start=1):
            place = f"{path}, row {number}"
            try:
                yield DataError(f"{place}{fault}; correct it") if fault else Row.of(value, place)
            except DataError as error:
                yield error
    except JsonFault as fault:
        raise _broken(fault, path) from None


def decoded(text: bytes, place: str) -> str:
    """A text of bytes. Raises DataError where it is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: it is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _line(line: bytes, place: str) -> Row:
    text = decoded(line.removeprefix(MARK).rstrip(b"\r\n"), place)
    try:
        return Row.of(parse_row(text), place)
    except JsonFault as fault:
        column = f", column {fault.column}" if fault.column else ""
        raise DataError(f"{place}{column}: {fault.reason}; correct the file") from None


def _items(text: str) -> Iterator[tuple[Any, str | None]]:
    """The values of a list, each with what is wrong with it. Raises JsonFault where the text is broken."""
    at = _skip(text, 0)
    if at == len(text):
        return
    if text[at] != "[":
        raise JsonFault(f"expected a list of rows, got {describe(parse_row(text))}")
    repeated: list[str] = []
    decoder = collecting_decoder(repeated)
    at = _skip(text, at + 1)
    has_more = text[at : at + 1] != "]"
    while has_more:
        start = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise explain(error) from None
        yield value, _fault(value, text, start, at, repeated)
        repeated.clear()
        at = _skip(text, at)
        if has_more := text[at : at + 1] != "]":
            at = _skip(text, _past_comma(text, at))
    if (end := _skip(text, at + 1)) != len(text):
        raise explain(json.JSONDecodeError("Extra data", text, end))


def _fault(value: Any, text: str, start: int, end: int, repeated: list[str]) -> str | None:
    try:
        if repeated:
            raise JsonFault(f"key {repeated[0]!r} is given twice")
        check_depth(value, text.count("[", start, end) + text.count("{", start, end))
    except JsonFault as fault:
        line = text.count("\n", 0, start) + 1
        return f" (line {line}): {fault.reason}"
    return None


def _skip(text: str, at: int) -> int:
    return BLANK.match(text, at).end()


def _past_comma(text: str, at: int) -> int:
    if text[at : at + 1] != ",":
        raise explain(json.JSONDecodeError("Expecting ',' delimiter", text, at))
    return at + 1


def _broken(fault: JsonFault, path: Path) -> DataError:
    place = ", ".join(f"{name} {number}" for name, number in (("line", fault.line), ("column", fault.column)) if number)
    return DataError(f"{path}{', ' if place else ''}{place}: {fault.reason}; correct the file")


def _next_line(file: IO[bytes]) -> bytes:
    """The next line that is not blank; empty at the end of the file."""
    line = file.readline()
    while line and not line.removeprefix(MARK).strip():
        line = file.readline()
    return line.removeprefix(MARK)


def _is_whole(line: bytes) -> bool:
    try:
        parse_row(line.decode())
    except JsonFault as fault:
        return not fault.reason.startswith("broken JSON")
    except UnicodeDecodeError:
        return False
    return True


def _refuse_objects_over_lines(file: IO[bytes], path: Path, first: bytes, second: bytes) -> None:
    """Refuse an object that is not a row a line: it would be a fault for each of its lines, or a row without use."""
    if not second:
        _refuse_wrapper(first, path)
    goes_on = first.strip() == b"{" or second.lstrip()[:1] in (b'"', b"}")
    if not goes_on or not second or _is_whole(first):
        return
    file.seek(0)
    try:
        value = parse_row(decoded(file.read().removeprefix(MARK), str(path)))
    except JsonFault as fault:
        if "Extra data" in fault.reason:
            raise DataError(f"{path}: its JSON objects are written over several lines; {ONE_A_LINE}") from None
        raise _broken(fault, path) from None
    raise DataError(f"{path}: it is one JSON object over several lines, with {names_of(value)}; {ONE_A_LINE}")


def _refuse_wrapper(line: bytes, path: Path) -> None:
    try:
        value = parse_row(line.decode())
    except ValueError:
        return  # said where the row is read
    for name in WRAPPERS:
        held = value.get(name) if isinstance(value, dict) else None
        if isinstance(held, list) and held and isinstance(held[0], dict):
            raise DataError(
                f"{path}: it is one JSON object with its rows in {name!r}; {ONE_A_LINE}, without the object"
            )
