"""What lies on disk: ChatLLaMA's record shapes, and the same with more said, in JSON or JSONL.

    actor    {"user_input": str, "completion": str}
    reward   {"user_input": str, "completion": str, "score": float}     or
             {"user_input": str, "chosen": str, "rejected": str}
    prompts  {"user_input": str}

Any of them can say more about the prompt and hold more answers:

    "system": str, "narrative": str, "reply_name": str,
    "turns": [{"role": "user" | "assistant", "text": str, "name": str}, ...],
    "scored": [{"completion": str, "score": float | null}, ...], "ranked": [{"completion": str, "rank": int}, ...],
    "provenance": {"dataset": str, "row": str, "licence": str, "generated_by": str, "judged_by": str}

or be {"text": str}, plain text for language modeling. Where a row has turns, ``user_input`` is the same prompt as
one text, for programs that know ChatLLaMA's fields alone. These names become field terms here and nowhere else; rows as
TRL's users have them become these in `messages.py`. Files are only ever read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance, Ranked, Scored, Turn
from chatrlhf.data import stage_rows
from chatrlhf.data.chat_formats import in_our_shape
from chatrlhf.data.files import read_rows
from chatrlhf.data.json_row import Row, describe
from chatrlhf.data.long_rows import announce_if_long
from chatrlhf.data.stage_rows import ActorRow, Preference, ScoredCompletion, texts_of
from chatrlhf.data.unread_fields import OF_MESSAGES, refuse_unread
from chatrlhf.errors import DataError

# What ChatLLaMA advises; fewer is a warning.
ADVISED_ROWS = {"actor": 1000, "reward": 100, "prompts": 1000}
PROMPT_PARTS = ("turns", "system", "narrative", "reply_name")


def from_json(row: Row) -> Conversation:
    """A record from its JSON object, in this project's shapes or in TRL's. Raises DataError with place and field."""
    row = in_our_shape(row)
    record = Conversation(**{part: read(row) for part, read in PARTS.items()})
    return replace(record, prompt=replace(record.prompt, place=row.place))


def faults_of(row: Row) -> list[DataError]:
    """Everything that keeps a row from being a record, not only the first of it."""
    try:
        row = in_our_shape(row)
    except DataError as error:
        return [error]
    faults = []
    for read in PARTS.values():
        try:
            read(row)
        except DataError as error:
            faults.append(error)
    return faults


def to_json(record: Conversation) -> dict[str, Any]:
    """The JSON object of a record: ChatLLaMA's fields where they can hold it, `from_json` of which is the record."""
    values: dict[str, Any]
    prompt = record.prompt
    if record.text is not None:
        values = {"text": record.text}
    elif prompt.is_text:
        values = {"user_input": prompt.text}
    else:
        turns = [_given(asdict(turn)) for turn in prompt.turns]
        parts = {"system": prompt.system, "narrative": prompt.narrative, "reply_name": prompt.reply_name}
        values = {"user_input": prompt.text, **_given(parts), "turns": turns}
    scored = [{"completion": answer.completion, "score": answer.score} for answer in record.scored]
    if record.completion is None and len(scored) == 1:
        values |= scored[0]
    elif scored:
        values["scored"] = scored
    if record.completion is not None:
        values["completion"] = record.completion
    if record.ranked:
        values["ranked"] = [asdict(answer) for answer in record.ranked]
    if record.pair is not None:
        values |= asdict(record.pair)
    if provenance := _given(asdict(record.provenance)):
        values["provenance"] = provenance
    return values


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _is_text(row: Row) -> bool:
    return "text" in row and "user_input" not in row and "turns" not in row


def _text(row: Row) -> str | None:
    return row.text("text") if _is_text(row) else None


def _prompt(row: Row) -> Prompt:
    if _is_text(row):
        return Prompt()
    if not any(part in row for part in PROMPT_PARTS):
        return Prompt.of(row.text("user_input"))
    if "turns" in row:
        turns = tuple(_turn(turn) for turn in row.rows("turns"))
    else:
        turns = (Turn("user", row.text("user_input")),)
    prompt = Prompt(turns, *(row.optional_text(part) for part in PROMPT_PARTS[1:]))
    if "turns" in row and row.optional_text("user_input") not in (None, prompt.text):
        raise row.wrong("user_input", "it is not what 'turns' says; correct one of them, or remove user_input")
    return prompt


def _turn(row: Row) -> Turn:
    refuse_unread(row, OF_MESSAGES)
    role = row.text("role")
    if role not in ("user", "assistant"):
        raise row.wrong("role", f"expected 'user' or 'assistant', got {describe(role)}")
    return Turn(role, row.text("text"), row.optional_text("name"))


def _completion(row: Row) -> str | None:
    return None if "score" in row.values else row.optional_text("completion")


def _scored(row: Row) -> tuple[Scored, ...]:
    scored = [_scored_one(answer) for answer in row.rows("scored")]
    # ChatLLaMA's row: its completion is the one that is scored.
    if "score" in row.values and "completion" in row:
        scored.append(_scored_one(row))
    return tuple(scored)


def _scored_one(row: Row) -> Scored:
    completion = row.text("completion")
    if "score" not in row.values:
        raise DataError(f"{row.place}: field 'score' is missing; give a number, or null where it is not scored yet")
    return Scored(completion, row.score("score"))


def _ranked(row: Row) -> tuple[Ranked, ...]:
    return tuple(Ranked(answer.text("completion"), answer.whole_number("rank")) for answer in row.rows("ranked"))


def _pair(row: Row) -> Pair | None:
    is_pair = "chosen" in row or "rejected" in row
    return Pair(row.text("chosen"), row.text("rejected")) if is_pair else None


def _provenance(row: Row) -> Provenance:
    given = row.row("provenance")
    return Provenance(*(given.optional_text(name) for name in Provenance.__dataclass_fields__))


# How each part of a record is read.
PARTS: dict[str, Callable[[Row], Any]] = {
    "prompt": _prompt,
    "completion": _completion,
    "scored": _scored,
    "ranked": _ranked,
    "pair": _pair,
    "text": _text,
    "provenance": _provenance,
}


def read_records(path: Path) -> Iterator[tuple[Row, Conversation]]:
    """Every row of a file, in this project's fields, and its record. Raises DataError, also where there is none."""
    empty = True
    for row in read_rows(path):
        empty = False
        row = in_our_shape(row)
        yield row, from_json(row)
    if empty:
        raise DataError(f"{path}: it holds no rows; a dataset needs at least one")


def actor_rows(row: Row, record: Conversation) -> list[ActorRow]:
    """What the ACTOR stage has of a row. Raises DataError where that is nothing."""
    drawn = stage_rows.demonstrations(record)
    if not drawn:
        if "turns" in row:
            raise DataError(f"{row.place}: no completion follows its turns; add one, in messages as the last")
        row.text("completion")  # says what is missing
        raise DataError(f"{row.place}: it holds no completion; add one")
    return drawn


def reward_rows(row: Row, record: Conversation) -> list[ScoredCompletion] | list[Preference]:
    """What the REWARD stage has of a row, all scored or all preferences; of ranks that are all equal nothing.

    Raises:
        DataError: also for a null score, which `generate_rewards.py` fills.
    """
    try:
        drawn = stage_rows.scored_completions(record) if record.scored else stage_rows.preferences(record)
    except DataError as error:
        raise DataError(f"{row.place}, {error}") from None
    if not drawn and not record.ranked:
        raise DataError(
            f"{row.place}: field 'score' is missing; give a number, or use preference rows with 'chosen' and 'rejected'"
        )
    return drawn


def prompt_rows(row: Row, record: Conversation) -> list[Prompt]:
    """What the RL stage has of a row; answers are not looked at. Raises DataError where there is no prompt."""
    drawn = stage_rows.prompts(record)
    if not drawn:
        raise DataError(f"{row.place}: it holds plain text and no prompt (user_input); remove it")
    return drawn


StageRows = Callable[[Row, Conversation], list[Any]]


def read_stage(path: Path, rows_of: StageRows) -> tuple[list[Any], list[Hashable]]:
    """A stage's rows of a file, and the group of each: rows of one prompt, or of one tree, are not split.

    Args:
        rows_of: one of the three above.

    Raises:
        DataError: with file, row and field; also where scored rows and preferences are mixed, or there are none.
    """
    rows: list[Any] = []
    groups: list[Hashable] = []
    for row, record in read_records(path):
        drawn = rows_of(row, record)
        if rows_of is reward_rows and drawn and rows and type(drawn[0]) is not type(rows[0]):
            raise DataError(
                f"{row.place}: scored rows (completion, score) and preference rows (chosen, rejected) are mixed; "
                "keep one shape a file"
            )
        announce_if_long(row.place, texts_of(record))
        rows += drawn
        groups += [record.provenance.group or record.text or record.prompt] * len(drawn)
    if not rows:
        raise DataError(f"{path}: no two of its ranked completions differ in rank, so there is nothing to prefer")
    return rows, groups


def read_demonstrations(path: Path) -> list[ActorRow]:
    """Rows of the ACTOR stage. Raises DataError with file, row and field."""
    return read_stage(path, actor_rows)[0]


def read_judgements(path: Path) -> list[ScoredCompletion] | list[Preference]:
    """Rows of the REWARD stage, all scored or all preferences. Raises DataError with file, row and field."""
    return read_stage(path, reward_rows)[0]


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of the RL stage. Raises DataError with file, row and field."""
    return read_stage(path, prompt_rows)[0]
