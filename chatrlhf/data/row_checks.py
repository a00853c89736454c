"""Checks of a stage's rows: how many say the same, how many held-out ones are trained on, how many are too long."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from chatrlhf.conversation import Prompt
from chatrlhf.data.inputs import Rows
from chatrlhf.data.stage_rows import PlainText
from chatrlhf.runtime.check_result import CheckResult, judged

FEW = 0.01  # share of rows that may be repeated, or held out and trained on, before it is worth a warning
LONG = 0.05  # share of rows that may be longer than the context
READ_AGAIN = 20_000  # rows of a mixture that is not in memory: each is read from its file again
SAMPLED = 2000  # rows that are tokenized where not all of them are anyway


def check_repeats(stage: str, rows: Rows) -> CheckResult:
    """How many training rows say what an earlier one says."""
    looked_at = _some(rows.train)
    repeats = len(looked_at) - len(set(looked_at))
    share = repeats / len(looked_at)
    measured = f"{repeats:,} of {_named(looked_at, rows.train)} rows repeat an earlier one ({share:.1%})"
    remedy = "remove them, unless they are meant to weigh more (chatrlhf data stats counts them; deduplicate: True)"
    return judged(f"{stage} repeated rows", measured, remedy, warn=share > FEW)


def check_overlap(stage: str, rows: Rows) -> CheckResult:
    """How many held-out rows have a prompt, or a text, that is trained on: what is measured on them is too good."""
    name = f"{stage} held-out rows"
    if not len(rows.held_out):
        return CheckResult(name, "pass", "none are held out")
    looked_at = _some(rows.train)
    trained = {_subject(row) for row in looked_at}
    shared = sum(_subject(row) in trained for row in rows.held_out)
    measured = (
        f"{shared:,} of {len(rows.held_out):,} have a prompt that is also in {_named(looked_at, rows.train)} training "
        f"rows ({shared / len(rows.held_out):.1%})"
    )
    remedy = "remove these prompts from the validation file, or leave it out: a part that shares none is held out then"
    return judged(name, measured, remedy, warn=shared > FEW * len(rows.held_out))


def check_lengths(stage: str, lengths: Sequence[int], rows: int, limit: int, over_length: str) -> CheckResult:
    """How many rows are longer than the context.

    Args:
        lengths: tokens of the rows that were looked at.
        rows: of the stage.
        limit: tokens that a row may have.
        over_length: what becomes of a longer one, ``drop`` or ``cut``.
    """
    long = sum(length > limit for length in lengths)
    fate = "dropped" if over_length == "drop" else "cut"
    count = f"{len(lengths):,}" if len(lengths) == rows else f"{len(lengths):,} sampled"
    measured = (
        f"{long:,} of {count} rows are longer than {limit:,} tokens and are {fate} ({long / len(lengths):.1%}; the "
        f"longest has {max(lengths):,})"
    )
    remedy = "raise max_sequence_length as far as the model reads, or shorten the rows"
    return judged(f"{stage} long rows", measured, remedy, warn=long > LONG * len(lengths))


def sampled(rows: Sequence[Any], number: int = SAMPLED) -> list[Any]:
    """At most so many rows, from all parts."""
    step = -(-len(rows) // number)
    return [rows[i] for i in range(0, len(rows), step)] if len(rows) else []


def _subject(row: Any) -> Hashable:
    """The prompt of a row, or its text."""
    if isinstance(row, Prompt):
        return row
    return row.text if isinstance(row, PlainText) else row.prompt


def _some(rows: Sequence[Any]) -> Sequence[Any]:
    """All rows, or the first of those that would have to be read again."""
    return rows if isinstance(rows, list) else [rows[i] for i in range(min(len(rows), READ_AGAIN))]


def _named(looked_at: Sequence[Any], rows: Sequence[Any]) -> str:
    return f"{len(rows):,}" if len(looked_at) == len(rows) else f"the first {len(looked_at):,}"
