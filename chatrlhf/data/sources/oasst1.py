"""OpenAssistant/oasst1: trees of messages, a tree a row or its messages a row each, the replies to each put in order.

Of every prompter's message: its replies as ranked completions, and each reply but the best once more by itself, so
that the actor's rows are all paths from the root to an assistant's message, the best first. A tree is never parted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

from chatrlhf.conversation import Conversation, Prompt, Provenance, Ranked, Turn
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Converted, LeftOut, Source

READY = "ready_for_export"


def records(row: Row) -> Converted:
    """Records of a tree, from the root down. Raises DataError for a message without text or role."""
    state = row.optional_text("tree_state")
    if state not in (None, READY):
        yield LeftOut("trees that are not ready for export")
        return
    tree = row.optional_text("message_tree_id")
    for record in _below(row.row("prompt"), Prompt()):
        if isinstance(record, Conversation):
            record = replace(record, provenance=replace(record.provenance, group=tree))
        yield record


def _below(message: Row, before: Prompt) -> Converted:
    """Records of a prompter's message and of all that follows it."""
    if message.text("role") != "prompter":
        raise message.wrong("role", "expected 'prompter', since the assistant has the next turn")
    if message.flag("deleted") or not message.text("text").strip():
        yield LeftOut("messages that are deleted or empty, with what follows them")
        return
    prompt = Prompt((*before.turns, Turn("user", message.text("text"))))
    provenance = _provenance(message)
    replies = []
    for reply in sorted(message.rows("replies"), key=_rank):
        if reply.text("role") != "assistant":
            raise reply.wrong("role", "expected 'assistant', since it replies to the prompter")
        if reply.flag("deleted") or not reply.text("text").strip():
            yield LeftOut("messages that are deleted or empty, with what follows them")
        else:
            replies.append(reply)
    texts = [reply.text("text") for reply in replies]
    placed = [reply for reply in replies if "rank" in reply]
    if len(placed) > 1:
        ranked = tuple(Ranked(reply.text("text"), reply.whole_number("rank")) for reply in placed)
        yield Conversation(prompt, ranked=ranked, provenance=provenance)
    for reply in replies[1 if len(placed) > 1 else 0 :]:
        yield Conversation(prompt, completion=reply.text("text"), provenance=_provenance(reply))
    if not replies:
        yield Conversation(prompt, provenance=provenance)
    for reply, text in zip(replies, texts, strict=True):
        answered = replace(prompt, turns=(*prompt.turns, Turn("assistant", text)))
        for message_below in reply.rows("replies"):
            yield from _below(message_below, answered)


def _rank(reply: Row) -> tuple[bool, int]:
    return ("rank" not in reply, reply.whole_number("rank") if "rank" in reply else 0)


def _provenance(message: Row) -> Provenance:
    """A message that no person wrote says which model did."""
    by = message.optional_text("model_name") if message.flag("synthetic") else None
    return Provenance(row=message.optional_text("message_id"), generated_by=by)


def trees(rows: Iterator[Row]) -> Iterator[Row]:
    """Trees as they are; messages, which follow each other depth-first, put together to the trees they are of."""
    for tree_id, messages in groupby(rows, key=_tree_id):
        if tree_id is None:
            yield from messages
            continue
        root: dict[str, Any] | None = None
        known: dict[str, dict[str, Any]] = {}
        for message in messages:
            own_id, parent = message.text("message_id"), message.optional_text("parent_id")
            known[own_id] = {**message.values, "replies": []}
            if parent is None:
                root, place = known[own_id], message.place
            elif parent in known:
                known[parent]["replies"].append(known[own_id])
            else:
                raise message.wrong("parent_id", f"no message {parent!r} stands before it in its tree")
        if root is None:
            raise message.wrong("parent_id", "none of the tree's messages is its root")
        yield Row({"message_tree_id": tree_id, "prompt": root}, place, message.of_text)


def _tree_id(row: Row) -> str | None:
    return None if "prompt" in row else row.text("message_tree_id")


def _language(row: Row) -> str:
    return row.row("prompt").text("lang")


SOURCE = Source(
    hub_name="OpenAssistant/oasst1",
    licence="Apache-2.0",
    size="88,800 messages in 10,400 trees",
    template="orca",
    convert=records,
    splits=("train", "validation"),
    language=_language,
    gather=trees,
)
