"""What each stage draws from a record: actor rows, judged rows, prompts.

A view gives none where a record holds nothing for its stage. Judgements are turned into each other where that
loses nothing that the stage needs; what would have to be made up is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from chatrlhf.conversation import Conversation, Prompt, Scored
from chatrlhf.errors import DataError


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the completion to imitate."""

    prompt: Prompt
    completion: str
    loss_on: str | None = None  # what is trained of it, where its dataset says so


@dataclass(frozen=True)
class PlainText:
    """Text for language modeling, all of it trained."""

    text: str
    ends: bool = True  # whether the document ends here, or is cut


ActorRow = Demonstration | PlainText


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with a score; 0 is a score."""

    prompt: Prompt
    completion: str
    score: float


@dataclass(frozen=True)
class Preference:
    """Two completions of one prompt, the first preferred."""

    prompt: Prompt
    chosen: str
    rejected: str


def demonstrations(record: Conversation) -> list[ActorRow]:
    """Rows of the ACTOR stage: the text, or the prompt with its completion, or with the best of several.

    Of ranked completions those that share the first place, of scored ones the best, of a pair the chosen one.
    """
    if record.text is not None:
        return [PlainText(record.text)]
    if record.completion is not None:
        best = [record.completion]
    elif record.pair is not None:
        best = [record.pair.chosen]
    elif record.ranked:
        first = min(answer.rank for answer in record.ranked)
        best = [answer.completion for answer in record.ranked if answer.rank == first]
    else:
        best = [max(record.scored, key=_worth).completion] if record.scored else []
    return [Demonstration(record.prompt, completion) for completion in best]


def plain_texts(record: Conversation) -> list[PlainText]:
    """Rows of the PRETRAIN stage. Raises DataError where a record is a dialogue."""
    if record.text is None:
        raise DataError("it holds a dialogue and no plain text; give a field 'text', or train on it by ACTOR")
    return [PlainText(record.text)]


def _worth(answer: Scored) -> float:
    return float("-inf") if answer.score is None else answer.score


def preferences(record: Conversation) -> list[Preference]:
    """Every pair of completions that the record puts in an order, the better one first; equals are no pair."""
    pairs = [] if record.pair is None else [(record.pair.chosen, record.pair.rejected)]
    by_rank = [(-answer.rank, answer.completion) for answer in record.ranked]
    by_score = [(answer.score, answer.completion) for answer in record.scored if answer.score is not None]
    for answers in (by_rank, by_score):
        for first, second in combinations(sorted(answers, key=lambda answer: -answer[0]), 2):
            if first[0] > second[0]:
                pairs.append((first[1], second[1]))
    return [Preference(record.prompt, chosen, rejected) for chosen, rejected in pairs]


def paired(rows: Sequence[ScoredCompletion]) -> list[tuple[int, Preference]]:
    """Every two completions of one prompt that differ in score, the better one first, with the place of the first."""
    of_prompt: dict[Prompt, list[tuple[int, ScoredCompletion]]] = {}
    for place, row in enumerate(rows):
        of_prompt.setdefault(row.prompt, []).append((place, row))
    pairs = []
    for answers in of_prompt.values():
        for (place, first), (_, second) in combinations(answers, 2):
            better, worse = (first, second) if first.score > second.score else (second, first)
            if better.score > worse.score:
                pairs.append((place, Preference(first.prompt, better.completion, worse.completion)))
    return sorted(pairs, key=lambda pair: pair[0])


def scored_completions(record: Conversation) -> list[ScoredCompletion]:
    """Each completion with its score.

    Raises:
        DataError: the record holds an order only, from which no score follows; or a score is missing.
    """
    if not record.scored and (record.ranked or record.pair):
        held = "ranks" if record.ranked else "a chosen and a rejected completion"
        raise DataError(f"it holds {held} and no scores, which cannot be made up; train on preferences")
    if any(answer.score is None for answer in record.scored):
        raise DataError("field 'score': it is null; score the file first: python artifacts/generate_rewards.py FILE")
    return [ScoredCompletion(record.prompt, answer.completion, answer.score) for answer in record.scored]


def is_judged(record: Conversation) -> bool:
    """Whether it says which completions are better, or how good they are."""
    return bool(record.pair or record.ranked or record.scored)


def completions_of(record: Conversation) -> list[str]:
    """Every completion in a record."""
    pair = [] if record.pair is None else [record.pair.chosen, record.pair.rejected]
    alone = [] if record.completion is None else [record.completion]
    return [*alone, *(each.completion for each in (*record.scored, *record.ranked)), *pair]


def prompts(record: Conversation) -> list[Prompt]:
    """The prompt, for the RL stage; plain text has none."""
    return [] if record.text is not None else [record.prompt]


def texts_of(record: Conversation) -> list[str]:
    """All texts of a record, for making a tokenizer."""
    return [record.text] if record.text is not None else [*words(record.prompt), *completions_of(record)]


def words(row: ActorRow | ScoredCompletion | Preference | Prompt) -> list[str]:
    """All texts of a row, for making a tokenizer."""
    if isinstance(row, Prompt):
        parts = [row.system, row.narrative, *(turn.text for turn in row.turns)]
        return [part for part in parts if part is not None]
    texts = [words(value) if isinstance(value, Prompt) else [value] for value in vars(row).values()]
    return [text for part in texts for text in part if isinstance(text, str)]
