"""shahules786/orca-chat: a system text and exchanges; similar ones of dolphin's put together."""

from __future__ import annotations

from chatrlhf.conversation import Conversation, Prompt, Provenance, Turn
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, LeftOut, Source


def records(row: Row) -> Converted:
    """A conversation, whose last output is the completion."""
    exchanges = row.rows("conversation")
    if not exchanges:
        return [LeftOut("conversations without turns")]
    said = [
        (role, exchange.text(f)) for exchange in exchanges for role, f in (("user", "input"), ("assistant", "output"))
    ]
    if not all(text.strip() for _, text in said):
        return [LeftOut("conversations with an empty turn")]
    *turns, (_, completion) = said
    prompt = Prompt(tuple(Turn(role, text) for role, text in turns), system=row.optional_text("instruction") or None)
    return [Conversation(prompt, completion=completion, provenance=Provenance(generated_by="gpt-4"))]


SOURCE = Source(
    hub_name="shahules786/orca-chat",
    licence="Apache-2.0",
    size="193,842 conversations",
    template="orca",
    convert=records,
)
