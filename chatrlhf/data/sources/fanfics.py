"""atom-in-the-universe/fanfics-10k-50k: long stories, for language modeling."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, document


def records(row: Row) -> Converted:
    """A document."""
    yield document(row.text("TEXT"))


SOURCE = Source(
    hub_name="atom-in-the-universe/fanfics-10k-50k",
    licence="not stated",
    size="48,760 stories",
    template="raw",
    convert=records,
)
