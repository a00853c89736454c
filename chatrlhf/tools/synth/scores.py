"""Scores for the completions of a file that have none; every score that is given stays what it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from chatrlhf.conversation import Conversation, Scored
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import to_json
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.judge import Calibration, Judge, Judgement
from chatrlhf.tools.synth.row_makers import Made, RowMaker, make_rows


@dataclass
class Slot:
    """A completion, and the JSON object that its score belongs into."""

    prompt: str
    completion: str
    target: dict[str, Any]
    given: float | None
    is_human: bool  # given, and not by a model
    whole: dict[str, Any]  # the row that the object is in, or is


@dataclass
class Sheet:
    """A dataset's rows as they will be written, and the completions in them."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    pairs: list[tuple[Slot, Slot]] = field(default_factory=list)  # of preferred and other, where people had chosen
    without: list[str] = field(default_factory=list)  # places of rows that hold no completion

    @property
    def open(self) -> list[Slot]:
        """Completions without a score."""
        return [slot for slot in self.slots if slot.given is None]

    @property
    def scored(self) -> list[Slot]:
        """Completions that came with a score."""
        return [slot for slot in self.slots if slot.given is not None]

    @property
    def human(self) -> list[Slot]:
        """Those of them whose score is not a judge's."""
        return [slot for slot in self.scored if slot.is_human]


def load_scores(records: Iterable[tuple[Row, Conversation]]) -> Sheet:
    """The rows of a dataset made ready for scores.

    A row with a completion is kept with all its fields. One with a chosen and a rejected completion, or with ranked
    ones, becomes a row for each of them: a score is a statement about one completion.
    """
    sheet = Sheet()
    for row, record in records:
        prompt = record.prompt.text
        if record.pair is not None or record.ranked:
            pair = [] if record.pair is None else [record.pair.chosen, record.pair.rejected]
            completions = [*pair, *(answer.completion for answer in record.ranked)]
            slots = []
            for completion in completions:
                made = to_json(
                    Conversation(record.prompt, scored=(Scored(completion, None),), provenance=record.provenance)
                )
                sheet.rows.append(made)
                slots.append(Slot(prompt, completion, made, None, False, made))
            sheet.slots += slots
            if pair:
                sheet.pairs.append((slots[0], slots[1]))
        elif record.scored or record.completion is not None:
            kept = copy.deepcopy(row.values)
            sheet.rows.append(kept)
            if record.completion is not None:
                kept["score"] = None
            targets = [*(kept.get("scored") or []), *([kept] if kept.get("completion") is not None else [])]
            for target in targets:
                given = target["score"] if target["score"] is None else float(target["score"])
                is_human = given is not None and record.provenance.judged_by is None
                sheet.slots.append(Slot(prompt, target["completion"], target, given, is_human, kept))
        else:
            sheet.without.append(row.place)
    return sheet


async def fill_in(
    sheet: Sheet, judge: Judge, client: LLMClient, done: Callable[[], None] = lambda: None
) -> Made[Judgement]:
    """Score what is open. Rows left without any score are taken out of the sheet, and stand in what is put aside."""
    made = await make_rows([_maker(judge, slot) for slot in sheet.open], client, done)
    for slot, judgement in zip(sheet.open, made.rows, strict=True):
        if judgement is not None:
            _enter(slot.target, slot.whole, judgement, client.generator.model)
    for row in sheet.rows:
        if row.get("scored"):
            row["scored"] = [answer for answer in row["scored"] if answer["score"] is not None]
    sheet.rows = [row for row in sheet.rows if row.get("scored") or row.get("score") is not None]
    return made


async def score_records(
    records: Sequence[Conversation], judge: Judge, client: LLMClient, done: Callable[[], None] = lambda: None
) -> Made[dict[str, Any]]:
    """New records, with a completion each, as rows with a score."""

    def maker(record: Conversation) -> RowMaker[dict[str, Any]]:
        completion = record.completion or ""

        async def make(client: LLMClient) -> dict[str, Any]:
            judgement = await judge.score(client, record.prompt.text, completion)
            row = to_json(replace(record, completion=None, scored=(Scored(completion, None),)))
            _enter(row, row, judgement, client.generator.model)
            return row

        return make

    return await make_rows([maker(record) for record in records], client, done)


async def calibrate(
    slots: Sequence[Slot], judge: Judge, client: LLMClient, done: Callable[[], None] = lambda: None
) -> tuple[Calibration | None, Made[Judgement]]:
    """Judge completions that people have scored, and compare; the given scores stay."""
    made = await make_rows([_maker(judge, slot) for slot in slots], client, done)
    both = [(slot.given, said.mean) for slot, said in zip(slots, made.rows, strict=True) if said is not None]
    if not both:
        return None, made
    human, judged = zip(*both, strict=True)
    return Calibration(human, judged), made


def sample(slots: Sequence[Slot], most: int, seed: int) -> list[Slot]:
    """At most so many of them, drawn by the seed, in their order."""
    return [slots[i] for i in sorted(random.Random(seed).sample(range(len(slots)), min(most, len(slots))))]


def agreement_line(sheet: Sheet) -> str | None:
    """How often the judge's scores put chosen above rejected, where people had chosen."""
    scores = [(a.target.get("score"), b.target.get("score")) for a, b in sheet.pairs]
    both = [(a, b) for a, b in scores if a is not None and b is not None]
    if not both:
        return None
    right, equal = sum(a > b for a, b in both), sum(a == b for a, b in both)
    return (
        f"the judge puts {right:,} of {len(both):,} chosen replies above the rejected one, {equal:,} level with it, "
        f"{len(both) - right - equal:,} below"
    )


def _maker(judge: Judge, slot: Slot) -> RowMaker[Judgement]:
    async def make(client: LLMClient) -> Judgement:
        return await judge.score(client, slot.prompt, slot.completion)

    return make


def _enter(target: dict[str, Any], row: dict[str, Any], judgement: Judgement, model: str) -> None:
    target["score"] = round(judgement.mean, 6)
    if len(judgement.scores) + len(judgement.without) > 1:
        target["score_std"] = round(judgement.spread, 6)
        target["judgements"] = list(judgement.scores)
    row["provenance"] = {**(row.get("provenance") or {}), "judged_by": model}
