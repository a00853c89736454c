"""Rows of a CSV file, as RFC 4180 defines it: separated by commas, quotes inside a quoted cell written twice.

Python's reader takes much more, and tells different rows out of it than the writer meant. What it forgives is a fault
here. An empty cell is null; a score may be written in a cell, as any other number.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from chatrlhf.data.json_row import Row
from chatrlhf.errors import DataError

MARK = "\ufeff"  # byte-order mark
CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^",\r\n]*)'
RECORD = re.compile(rf"{CELL}(?:,{CELL})*[\r\n]*")
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8, as Python's error handler has them
SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def csv_rows(file: IO[bytes], path: Path) -> Iterator[Row | DataError]:
    """The rows below the header, and for one that is broken the error about it.

    Raises:
        DataError: nothing behind this place can be read; or the header cannot be used.
    """
    csv.field_size_limit(2**31 - 1)
    lines = _Lines(io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline=""))
    records = _records(lines, path)
    names = next((cells for _, cells, _ in records), None)
    if names is None:
        return
    _check_header(names, path)
    for place, cells, text in records:
        fault = _fault(cells, text, names)
        yield DataError(f"{place}: {fault}") if fault else Row(_values(names, cells), place, of_text=True)


class _Lines:
    """Lines of a text; those of the record that is being read are kept."""

    def __init__(self, lines: Iterator[str]) -> None:
        self.lines, self.record, self.count = lines, [], 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.count += 1
        if not self.record:
            line = line.removeprefix(MARK)  # where files were joined, it is no part of the text
        self.record.append(line)
        return line


def _records(lines: _Lines, path: Path) -> Iterator[tuple[str, list[str], str]]:
    """The place of each record, its cells and its text, the header first; blank lines are passed over."""
    reader = csv.reader(lines, strict=True)
    number = 0
    while True:
        line = lines.count + 1
        place = f"{path}, row {number} (line {line})" if number else f"{path}, line {line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{place}: {_reason(str(error), lines.count)}") from None
        text = "".join(lines.record)
        lines.record.clear()
        if not text.isascii() and ESCAPED.search(text):
            raise DataError(f"{place}: it is not UTF-8 text; save the file as UTF-8")
        if cells:
            yield place, cells, text
            number += 1


def _reason(message: str, line: int) -> str:
    if "end of data" in message:
        return 'a cell is opened by a quote that is never closed; close it, or write a quote in a cell twice ("")'
    if "expected after" in message:
        return (
            f'there is text behind a closing quote, in line {line}; write a quote inside a quoted cell twice (""), '
            "or close the quote before"
        )
    return f"broken CSV ({message}); correct the file"


def _check_header(names: list[str], path: Path) -> None:
    for separator, plural in SEPARATORS.items():
        if len(names) == 1 and separator in names[0]:
            raise DataError(f"{path}: its cells are separated by {plural}; save it with commas, or as JSONL")
    for number, name in enumerate(names, start=1):
        # The first may be nameless: pandas writes its index so.
        if not name.strip() and number > 1:
            raise DataError(f"{path}: column {number} has no name in the first line; name it, or remove the column")
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: column {repeated[0]!r} is given twice in the first line; rename or remove one")


def _fault(cells: list[str], text: str, names: list[str]) -> str | None:
    if len(cells) != len(names):
        return f"it has {len(cells)} cells, and the first line names {len(names)}; quote cells that hold commas"
    if cells == names:
        return "it is the first line again; where files were joined, keep the header of the first alone"
    if "\0" in text:
        return "it holds a NUL byte, which is no text; remove it"
    if '"' in text and not RECORD.fullmatch(text):
        return 'there is a quote in a cell without quotes around it; write the cell as "... ""word"" ..."'
    return None


def _values(names: list[str], cells: list[str]) -> dict[str, str | None]:
    return {name: cell or None for name, cell in zip(names, cells, strict=True) if name.strip()}
