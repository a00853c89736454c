"""Anthropic/hh-rlhf: two whole transcripts a row, alike up to the last reply. The texts can be offensive.

The turns are told apart by what opens them, and keep every blank, so that template `hh` renders them back to the
transcript.
"""

from __future__ import annotations

import re

from chatrlhf.conversation import Conversation, Pair, Prompt, Role, Turn
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import EMPTY_REPLY, Converted, LeftOut, Source

HUMAN, ASSISTANT, BLANK = "\n\nHuman:", "\n\nAssistant:", " "
SPEAKER = re.compile("\n\n(Human|Assistant):")
ROLES: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}


def records(row: Row) -> Converted:
    """A pair. Raises DataError where a transcript is missing."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen.count(ASSISTANT) != rejected.count(ASSISTANT):
        return [LeftOut("transcripts with unequal numbers of turns")]
    before, separator, preferred = chosen.rpartition(ASSISTANT)
    other_before, _, other = rejected.rpartition(ASSISTANT)
    if before != other_before:
        return [LeftOut("transcripts that differ before the last reply")]
    turns = _turns(before)
    if not separator or turns is None or HUMAN in preferred or HUMAN in other:
        return [LeftOut("transcripts that do not go from a human turn to an assistant's reply")]
    if not (preferred.strip() and other.strip()):
        return [EMPTY_REPLY]
    if not all(said.startswith(BLANK) for said in (preferred, other, *(turn.text for turn in turns))):
        return [LeftOut("turns without a blank behind the colon")]
    prompt = Prompt(tuple(Turn(turn.role, turn.text.removeprefix(BLANK)) for turn in turns))
    return [Conversation(prompt, pair=Pair(preferred.removeprefix(BLANK), other.removeprefix(BLANK)))]


def _turns(transcript: str) -> list[Turn] | None:
    """Turns with whatever follows their colon; None where the transcript does not go from one human turn to another.

    Here and there one side speaks twice in a row.
    """
    before, *parts = SPEAKER.split(transcript)
    turns = [Turn(ROLES[speaker], said) for speaker, said in zip(parts[::2], parts[1::2], strict=True)]
    sides = [turn.role for turn in turns]
    return turns if not before and sides[:1] == sides[-1:] == ["user"] else None


SOURCE = Source(
    hub_name="Anthropic/hh-rlhf",
    licence="MIT",
    size="169,000 pairs",
    template="hh",
    convert=records,
    subsets=("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
    splits=("train", "test"),
    pairs_per_prompt=1,
)
