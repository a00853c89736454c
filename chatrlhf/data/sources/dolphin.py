"""ehartford/dolphin: a system text, a question and its answer."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, answered


def records(row: Row) -> Converted:
    """A question with its answer; an empty system text is none."""
    system = row.optional_text("instruction") or None
    yield answered(row.text("input"), row.text("output"), "gpt-4", system=system)


SOURCE = Source(
    hub_name="ehartford/dolphin",
    licence="Apache-2.0",
    size="millions of questions",
    template="orca",
    convert=records,
    splits=("train",),
)
