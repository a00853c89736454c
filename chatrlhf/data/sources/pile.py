"""The Pile, without the parts that are under copyright: documents of many kinds, for language modeling."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, document


def records(row: Row) -> Converted:
    """A document."""
    yield document(row.text("text"))


SOURCE = Source(
    hub_name="monology/pile-uncopyrighted",
    licence="that of each part",
    size="a terabyte of documents",
    template="raw",
    convert=records,
    is_huge=True,
)
