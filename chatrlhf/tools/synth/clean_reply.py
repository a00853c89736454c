"""What is left of a model's words when a row is made of them."""

from __future__ import annotations

import re

from chatrlhf.conversation import Provenance
from chatrlhf.tools.synth.llm import Reply
from chatrlhf.tools.synth.parse_judgement import STILL_THINKING, after_thinking
from chatrlhf.tools.synth.row_makers import RejectedReply

SENTENCE_END = re.compile(r".*[.!?。！？…][\"'”’)\]]*", re.DOTALL)
# What models put before a message although they were asked for the message alone.
LABEL = re.compile(r"\A\s*[*_]*(?:User|Human|Person|Assistant|Request|Reply)(?: \d+)?[*_]*:[*_]*\s*", re.IGNORECASE)
QUOTES = ('""', "“”", "''")


def message(reply: Reply, what: str, whole: bool = True) -> str:
    """A message in a reply, without what was thought before it, a speaker's name, or quotation marks around it.

    Args:
        what: it is, for people: "the assistant's reply".
        whole: a message that was cut at max_tokens is kept up to its last sentence; otherwise as it is.

    Raises:
        PutAside: the model declined, said nothing, or did not come to the end of a sentence.
    """
    if reply.refusal is not None:
        raise RejectedReply(f"{what}: declined ({reply.refusal})")
    text = after_thinking(reply.text)
    if text is None:
        raise RejectedReply(f"{what}: {STILL_THINKING}")
    text = LABEL.sub("", text).strip()
    if text[:1] + text[-1:] in QUOTES and len(text) > 1 and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    if not text:
        cut = "" if reply.finished else ", cut at --max_tokens"
        raise RejectedReply(f"{what}: it is empty{cut}")
    if reply.finished or not whole:
        return text
    sentences = SENTENCE_END.match(text)
    if sentences is None:
        raise RejectedReply(f"{what}: it was cut at --max_tokens before the end of a sentence", reply=reply.text)
    return sentences[0]


def written_by(model: str) -> Provenance:
    """Where a text of a model's comes from, and under whose terms it stands."""
    return Provenance(licence=f"terms of {model}", generated_by=model)
