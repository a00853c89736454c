"""tatsu-lab/alpaca: an instruction, where it has one its input below it, and an answer."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, Source, answered, with_input


def records(row: Row) -> Converted:
    """The instruction with its answer."""
    prompt = with_input(row.text("instruction"), row.optional_text("input"))
    yield answered(prompt, row.text("output"), "text-davinci-003")


SOURCE = Source(
    hub_name="tatsu-lab/alpaca",
    licence="CC-BY-NC-4.0",
    size="52,000 instructions",
    template="chatllama",
    convert=records,
)
