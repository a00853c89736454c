"""Self-Instruct's seed tasks, written by people: an instruction, and one or more inputs with their outputs."""

from __future__ import annotations

from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, LeftOut, Source, answered, with_input


def records(row: Row) -> Converted:
    """The instruction with each of its inputs, and the output."""
    instances = row.rows("instances")
    if not instances:
        yield LeftOut("tasks without an instance")
    for instance in instances:
        prompt = with_input(row.text("instruction"), instance.optional_text("input"))
        yield answered(prompt, instance.text("output"), row=row.optional_text("id"))


SOURCE = Source(
    hub_name="yizhongw/self_instruct",
    licence="Apache-2.0",
    size="175 tasks",
    template="chatllama",
    convert=records,
)
