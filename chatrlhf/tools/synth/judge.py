"""A language model as a judge: of one completion by a number, of two by a letter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from chatrlhf.functional.agreement import pearson
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.instructions import fill
from chatrlhf.tools.synth.llm import Message, Reply, Request
from chatrlhf.tools.synth.parse_judgement import NoVerdict, read_letter, read_score
from chatrlhf.tools.synth.row_makers import RejectedReply, ask_all

LETTERS = ("A", "B")


@dataclass(frozen=True)
class Judgement:
    """What a judge said of one completion, asked once or several times."""

    scores: tuple[float, ...]
    without: tuple[str, ...] = ()  # why other replies of the same judge hold no number

    @property
    def mean(self) -> float:
        """The score."""
        return fmean(self.scores)

    @property
    def spread(self) -> float:
        """Standard deviation of the single judgements."""
        return pstdev(self.scores)


@dataclass(frozen=True)
class Judge:
    """How a model is asked for judgements.

    A model on this machine (``is_bound``) chooses among the verdicts, whole and half numbers or letters; of an
    endpoint's replies the verdict is read.
    """

    templates: dict[str, str]
    scale: tuple[float, float] = (0.0, 5.0)
    temperature: float = 0.1
    max_tokens: int = 256
    judgements: int = 1  # of a completion
    is_bound: bool = False

    def requests(self, prompt: str, completion: str) -> list[Request]:
        """What is asked about one completion."""
        told = fill(self.templates["reward"], {"user_input": prompt, "completion": completion})
        low, high = self.scale
        steps = range(math.ceil(2 * low), math.floor(2 * high) + 1)
        choices = tuple(f"{step / 2:g}" for step in steps) if self.is_bound else ()
        return [self._request(told, nth, choices) for nth in range(self.judgements)]

    async def score(self, client: LLMClient, prompt: str, completion: str) -> Judgement:
        """The scores of a completion.

        Raises:
            PutAside: no reply holds a number on the scale.
        """
        replies = await ask_all(client, self.requests(prompt, completion))
        scores, without = [], []
        for reply in replies:
            try:
                scores.append(read_score(_words(reply), *self.scale))
            except NoVerdict as error:
                without.append(str(error))
        if not scores:
            raise RejectedReply(
                f"the judge's reply is no score: {without[0]}",
                user_input=prompt,
                completion=completion,
                replies=[reply.text for reply in replies],
            )
        return Judgement(tuple(scores), tuple(without))

    def pair_requests(self, prompt: str, first: str, second: str) -> list[Request]:
        """What is asked about two completions: the same in both orders, for judges like what they read first."""
        choices = LETTERS if self.is_bound else ()
        requests = []
        for a, b in ((first, second), (second, first)):
            texts = {"user_input": prompt, "completion_a": a, "completion_b": b}
            told = fill(self.templates["pairs"], texts)
            requests += [self._request(told, nth, choices) for nth in range(self.judgements)]
        return requests

    async def compare(self, client: LLMClient, prompt: str, first: str, second: str) -> bool:
        """Whether the first of two completions is preferred.

        Raises:
            PutAside: a reply names neither, or what is preferred depends on the order.
        """
        replies = await ask_all(client, self.pair_requests(prompt, first, second))
        details = {"user_input": prompt, "completions": [first, second], "replies": [reply.text for reply in replies]}
        try:
            letters = [read_letter(_words(reply)) for reply in replies]
        except NoVerdict as error:
            raise RejectedReply(f"the judge's reply is no choice: {error}", **details) from None
        half = len(letters) // 2
        for_first = letters[:half].count("A") + letters[half:].count("B")
        if for_first == half:
            raise RejectedReply("the judge prefers neither: the two orders contradict each other", **details)
        return for_first > half

    def _request(self, told: str, nth: int, choices: tuple[str, ...]) -> Request:
        return Request((Message("user", told),), self.temperature, self.max_tokens, nth, choices)


def _words(reply: Reply) -> str:
    if reply.refusal is not None:
        raise NoVerdict(f"declined ({reply.refusal})")
    if not reply.text.strip():
        raise NoVerdict("it is empty" if reply.finished else "it is empty, cut at --max_tokens")
    return reply.text


@dataclass(frozen=True)
class Calibration:
    """How a judge's scores go with those of people, of the same completions in the same order."""

    human: tuple[float, ...]
    judge: tuple[float, ...]

    @property
    def correlation(self) -> float:
        """Pearson's."""
        return pearson(self.human, self.judge)

    @property
    def rank_correlation(self) -> float:
        """Spearman's: Pearson's of the ranks, of which equals share the mean."""
        return pearson(_ranks(self.human), _ranks(self.judge))

    @property
    def difference(self) -> float:
        """Mean of |judge - human|."""
        return fmean(abs(a - b) for a, b in zip(self.judge, self.human, strict=True))

    def about(self) -> dict[str, float]:
        """For the metadata."""
        return {
            "rows": len(self.human),
            "pearson": round(self.correlation, 4),
            "spearman": round(self.rank_correlation, 4),
            "mean_difference": round(self.difference, 4),
        }

    def line(self) -> str:
        """For people."""
        line = f"calibration on {len(self.human):,} rows with a human score: "
        if len(self.human) < 2 or len(set(self.human)) == 1 or len(set(self.judge)) == 1:
            return f"{line}no correlation, one side never changes; they differ by {self.difference:.2f} on average"
        return (
            f"{line}correlation {self.correlation:.2f} (Pearson), {self.rank_correlation:.2f} (Spearman); they differ "
            f"by {self.difference:.2f} on average"
        )


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(values)
    first, last = {}, {}
    for place, value in enumerate(order):
        first.setdefault(value, place)
        last[value] = place
    return [(first[value] + last[value]) / 2 for value in values]
