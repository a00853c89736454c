"""jondurbin/airoboros-gpt4: instructions and responses, all of them by a model."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, answered


def records(row: Row) -> Converted:
    """An instruction with its response."""
    yield answered(row.text("instruction"), row.text("response"), "gpt-4")


SOURCE = Source(
    hub_name="jondurbin/airoboros-gpt4-1.4.1",
    licence="CC-BY-NC-4.0",
    size="not stated",
    template="airoboros",
    convert=records,
)
