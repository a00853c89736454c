"""Everything that is wrong with a file of rows, each fault with file, row and field."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chatrlhf.conversation import Conversation
from chatrlhf.data.files import read_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import faults_of, from_json
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.data.stage_rows import completions_of
from chatrlhf.errors import DataError

STAGES = ("actor", "reward", "rl")


def faults_in(path: Path, dataset: str | None = None, stage: str | None = None) -> Iterator[str]:
    """One line a fault, in the order of the rows. Of a file that cannot be read at all, one line.

    Args:
        dataset: whose rows these are, a key of `SOURCES`; None for this project's own.
        stage: one of `STAGES`, which the rows have to be of use to.
    """
    unreadable: list[DataError] = []
    rows = read_rows(path, unreadable.append)
    shapes: dict[str, Row] = {}
    is_empty = True
    try:
        if dataset is not None and SOURCES[dataset].gather is not None:
            rows = SOURCES[dataset].gather(rows)
        for row in rows:
            yield from _taken(unreadable)
            is_empty = False
            yield from _of_row(row, dataset, stage, shapes)
    except DataError as error:
        yield from _taken(unreadable)
        yield str(error)
        return
    if is_empty and not unreadable:
        yield f"{path}: it holds no rows that can be read"
    yield from _taken(unreadable)


def _taken(unreadable: list[DataError]) -> Iterator[str]:
    while unreadable:
        yield str(unreadable.pop(0))


def _of_row(row: Row, dataset: str | None, stage: str | None, shapes: dict[str, Row]) -> Iterator[str]:
    if dataset is None:
        if faults := faults_of(row):
            yield from map(str, faults)
            return
        records = [from_json(row)]
    else:
        try:
            converted = SOURCES[dataset].records(row)
        except DataError as error:
            yield str(error)
            return
        records = [record for record in converted if isinstance(record, Conversation)]
        yield from (f"{row.place}: left out: {each.reason}" for each in converted if isinstance(each, LeftOut))
    for record in records:
        yield from (f"{row.place}{fault}" for fault in _of_record(record, stage))
        shape = "scored" if record.scored else "preferred" if record.pair or record.ranked else None
        if stage == "reward" and shape is not None and shapes.setdefault(shape, row) is row and len(shapes) == 2:
            first = next(iter(shapes))
            yield f"{row.place}: it is {shape}, where earlier rows are {first}; keep one shape a file"


def _of_record(record: Conversation, stage: str | None) -> Iterator[str]:
    if record.text is not None:
        if not record.text.strip():
            yield ", field 'text': it is empty"
        if stage in ("reward", "rl"):
            yield f": it is plain text, which stage {stage} has no use for"
        return
    if not (record.prompt.text.strip() or record.prompt.reply_name):
        yield ", field 'user_input': it is empty"
    completions = completions_of(record)
    if not all(completion.strip() for completion in completions):
        yield ": a completion is empty"
    if record.pair is not None and record.pair.chosen == record.pair.rejected:
        yield ": 'chosen' and 'rejected' are the same"
    if stage == "actor" and not completions:
        yield ": field 'completion' is missing; add it"
    if stage == "reward":
        if not (record.scored or record.ranked or record.pair):
            yield ": nothing in it is scored, ranked or preferred"
        elif any(answer.score is None for answer in record.scored):
            yield ", field 'score': it is null; score the file first: python artifacts/generate_rewards.py FILE"
