"""The records of a file, in this project's rows or in those of a public dataset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatrlhf.conversation import Conversation
from chatrlhf.data.files import read_rows
from chatrlhf.data.records import from_json
from chatrlhf.data.row import Row
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.sources.catalogue import SOURCES


def records_in(path: Path, dataset: str | None) -> Iterator[tuple[Row, Conversation | LeftOut]]:
    """Each row with the records it gives.

    Args:
        dataset: whose rows these are, a key of `SOURCES`; None for this project's own.
    """
    rows = read_rows(path)
    if dataset is None:
        yield from ((row, from_json(row)) for row in rows)
        return
    source = SOURCES[dataset]
    for row in rows if source.gather is None else source.gather(rows):
        yield from ((row, record) for record in source.records(row))
