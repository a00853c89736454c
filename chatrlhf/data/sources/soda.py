"""allenai/soda: a scene and a dialogue in it, between people with names.

The last to speak is who a model learns to be; Shurale, which was trained on this, learnt from every word.
"""

from __future__ import annotations

from chatrlhf.conversation import Conversation, Prompt, Provenance, Turn
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import EMPTY_REPLY, Converted, LeftOut, Source


def records(row: Row) -> Converted:
    """A dialogue whose last line is the completion. Raises DataError where lines or names are missing."""
    lines, speakers = row.texts("dialogue"), row.texts("speakers")
    if not lines:
        return [LeftOut("dialogues without turns")]
    if len(lines) != len(speakers):
        return [LeftOut("dialogues with unequal numbers of turns and speakers")]
    if not lines[-1].strip():
        return [EMPTY_REPLY]
    last = speakers[-1]
    turns = tuple(
        Turn("assistant" if speaker == last else "user", line, speaker)
        for line, speaker in zip(lines[:-1], speakers[:-1], strict=True)
    )
    prompt = Prompt(turns, narrative=row.optional_text("narrative"), reply_name=last)
    return [Conversation(prompt, completion=lines[-1], provenance=Provenance(row=str(_index(row))))]


def _index(row: Row) -> int:
    return row.whole_number("original_index")


SOURCE = Source(
    hub_name="allenai/soda",
    licence="CC-BY-4.0",
    size="1,490,000 dialogues",
    template="shurale",
    convert=records,
    splits=("train", "validation", "test"),
    key=_index,
    loss_on="all",
)
