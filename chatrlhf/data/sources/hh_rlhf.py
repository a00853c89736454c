"""Anthropic/hh-rlhf: two whole transcripts a row, alike up to the last reply. The texts can be offensive.

The prompt stays whole: it runs from behind the first "\\n\\nHuman: " to the last "\\n\\nAssistant:", with
earlier turns inside, so that template `hh` renders prompt and reply back to the transcript byte for byte.
"""

from __future__ import annotations

from chatrlhf.data.records import Preference
from chatrlhf.data.sources import Row, Source, text_field
from chatrlhf.data.templates import TEMPLATES

_HH = TEMPLATES["hh"]


def to_preference(row: Row, place: str) -> Preference | str:
    """A pair, or why the row is left out. Raises DataError where a transcript is missing."""
    chosen, rejected = (text_field(row, field, place) for field in ("chosen", "rejected"))
    if chosen.count(_HH.after) != rejected.count(_HH.after):
        return "transcripts with unequal numbers of turns"
    prompt, preferred, separator = _split(chosen)
    other_prompt, other, other_separator = _split(rejected)
    if prompt != other_prompt:
        return "transcripts that differ before the last reply"
    if not (separator and other_separator and prompt.startswith(_HH.before)):
        return "transcripts that do not go from a human turn to an assistant's reply"
    if not (preferred.strip() and other.strip()):
        return "empty replies"
    if not (preferred.startswith(_HH.lead) and other.startswith(_HH.lead)):
        return "replies without a blank behind the colon"
    return Preference(prompt.removeprefix(_HH.before), _HH.strip(preferred), _HH.strip(other))


def _split(transcript: str) -> tuple[str, str, bool]:
    """What stands before and behind the last "Assistant:", and whether that reply ends the transcript."""
    prompt, separator, reply = transcript.rpartition(_HH.after)
    return prompt, reply, bool(separator) and _HH.turn_start not in reply


SOURCE = Source(
    hub_name="Anthropic/hh-rlhf",
    subsets=("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled"),
    splits=("train", "test"),
    suffix=".jsonl.gz",
    template="hh",
    pairs_per_prompt=1,
    convert=to_preference,
)
