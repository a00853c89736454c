"""togethercomputer/RedPajama-Data-1T-Sample: documents of many kinds, for language modeling."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, document


def records(row: Row) -> Converted:
    """A document."""
    yield document(row.text("text"))


SOURCE = Source(
    hub_name="togethercomputer/RedPajama-Data-1T-Sample",
    licence="that of each part",
    size="about a million documents",
    template="raw",
    convert=records,
)
