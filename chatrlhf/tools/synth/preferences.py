"""Which of two completions is better, by a judge who has seen them in both orders."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from chatrlhf.conversation import Conversation, Pair, Prompt, Provenance
from chatrlhf.data import stage_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import to_json
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.judge import Judge
from chatrlhf.tools.synth.row_makers import Made, RowMaker, make_rows


@dataclass
class Vote:
    """What people have preferred, and what is left to be judged."""

    given: list[Conversation] = field(default_factory=list)  # with a pair each
    open: list[tuple[Prompt, str, str, Provenance]] = field(default_factory=list)


def ballot_of(records: Iterable[tuple[Row, Conversation]]) -> Vote:
    """Pairs of completions of one prompt, in one row or in several.

    Given pairs, ranks and scores decide what they can; two completions with the same score, or with the same rank, are
    equals and no pair. What is left are pairs of which one at least has no score.
    """
    ballot = Vote()
    unscored: dict[Prompt, dict[str, tuple[float | None, Provenance]]] = {}
    for _, record in records:
        if record.pair is not None or record.ranked:
            known = replace(record, scored=(), completion=None)
            for each in stage_rows.preferences(known):
                pair = Pair(each.chosen, each.rejected)
                ballot.given.append(Conversation(record.prompt, pair=pair, provenance=record.provenance))
            continue
        of_prompt = unscored.setdefault(record.prompt, {})
        for answer in record.scored:
            of_prompt.setdefault(answer.completion, (answer.score, record.provenance))
        if record.completion is not None:
            of_prompt.setdefault(record.completion, (None, record.provenance))
    for prompt, answers in unscored.items():
        for (first, (a, whence)), (second, (b, _)) in combinations(answers.items(), 2):
            if a is None or b is None:
                ballot.open.append((prompt, first, second, whence))
            elif a != b:
                pair = Pair(first, second) if a > b else Pair(second, first)
                ballot.given.append(Conversation(prompt, pair=pair, provenance=whence))
    return ballot


async def judge_pairs(
    ballot: Vote, judge: Judge, client: LLMClient, done: Callable[[], None] = lambda: None
) -> tuple[list[dict[str, Any]], Made[Conversation]]:
    """Preference rows, given ones first, and what came of those that were judged."""
    made = await make_rows([_maker(judge, *each) for each in ballot.open], client, done)
    return [to_json(record) for record in [*ballot.given, *made.there]], made


async def agreement(
    given: list[Conversation], judge: Judge, client: LLMClient, done: Callable[[], None] = lambda: None
) -> tuple[str, Made[Conversation]]:
    """How often the judge prefers what people have chosen; for people, and what came of the judging."""
    wanted = [(each.prompt, each.pair.chosen, each.pair.rejected, each.provenance) for each in given if each.pair]
    made = await make_rows([_maker(judge, *each) for each in wanted], client, done)
    right = sum(said is not None and said.pair == each.pair for said, each in zip(made.rows, given, strict=True))
    undecided = len(given) - len(made.there)
    return (
        f"calibration on {len(given):,} pairs that people have judged: the judge agrees on {right:,}, differs on "
        f"{len(made.there) - right:,}, and is undecided on {undecided:,}"
    ), made


def _maker(judge: Judge, prompt: Prompt, first: str, second: str, whence: Provenance) -> RowMaker[Conversation]:
    async def make(client: LLMClient) -> Conversation:
        prefers_first = await judge.compare(client, prompt.text, first, second)
        pair = Pair(first, second) if prefers_first else Pair(second, first)
        return Conversation(prompt, pair=pair, provenance=replace(whence, judged_by=client.generator.model))

    return make
