"""Rows that are made by asking: as many at once as may be, in the order in which they were wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from chatrlhf.tools.synth.client import LimitReached, LLMClient
from chatrlhf.tools.synth.llm import NoAnswer, Reply, Request

MOST_REQUESTED = 4  # times the rows that are wanted, at most; a model that repeats itself gives no more
T = TypeVar("T")
RowMaker = Callable[[LLMClient], Awaitable[T]]


class RejectedReply(Exception):
    """A reply that is no row: it is kept, with the reason, beside the rows."""

    def __init__(self, reason: str, **details: Any) -> None:
        super().__init__(reason)
        self.details = details  # for people: what was asked about, what was replied


@dataclass
class Made(Generic[T]):
    """What came of the rows that were wanted."""

    rows: list[T | None] = field(default_factory=list)  # None where there is none
    aside: list[dict[str, Any]] = field(default_factory=list)
    unanswered: int = 0  # rows for which no one answered; another run may have them
    stopped: str | None = None  # by which limit, before all was asked

    @property
    def there(self) -> list[T]:
        """The rows that there are, in order."""
        return [row for row in self.rows if row is not None]

    @property
    def is_complete(self) -> bool:
        """Whether another run could add nothing."""
        return self.stopped is None and not self.unanswered


async def make_rows(
    makers: Sequence[RowMaker[T]], client: LLMClient, done: Callable[[], None] = lambda: None, first: int = 0
) -> Made[T]:
    """The rows of all makers, in their order whoever is answered first.

    Args:
        done: is called after each row.
        first: the number of the first of them, for what is put aside.

    Raises:
        GenerationError: no request can be answered; rows that are being made are given up.
    """
    made: Made[T] = Made([None] * len(makers))
    aside: dict[int, dict[str, Any]] = {}
    numbers = iter(range(len(makers)))

    async def work() -> None:
        for number in numbers:
            if made.stopped is not None:
                return
            try:
                made.rows[number] = await makers[number](client)
            except RejectedReply as error:
                aside[number] = {"row": first + number + 1, "reason": str(error), **error.details}
            except NoAnswer as error:
                made.unanswered += 1
                aside[number] = {"row": first + number + 1, "reason": str(error), "unanswered": True}
            except LimitReached as error:
                made.stopped = str(error)
                return
            done()

    workers = [asyncio.create_task(work()) for _ in range(min(client.limits.concurrency, len(makers)))]
    try:
        await asyncio.gather(*workers)
    except BaseException:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        raise
    made.aside += [aside[number] for number in sorted(aside)]
    return made


async def ask_all(client: LLMClient, requests: Sequence[Request]) -> list[Reply]:
    """The answers to several requests of one row, asked side by side; raises what the first of them raised."""
    answers = await asyncio.gather(*(client.ask(request) for request in requests), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer
    return answers  # type: ignore[return-value]


async def collect(
    wanted: int,
    maker: Callable[[int], RowMaker[T]],
    is_new: Callable[[T], bool],
    client: LLMClient,
    done: Callable[[], None] = lambda: None,
) -> tuple[Made[T], int]:
    """Rows that are new, in rounds of as many as are missing, until there are enough or no more come.

    What is new is decided in the order of the rows, not of their answers, so that it is the same in every run.

    Args:
        maker: of a row by its number, counted over all rounds.
        is_new: whether a row is kept; it may remember those it was asked about.

    Returns:
        The rows, and how many were dropped because they were not new.
    """
    made: Made[T] = Made()
    asked = dropped = 0
    while made.stopped is None:
        missing = min(wanted - len(made.rows), wanted * MOST_REQUESTED - asked)
        if missing <= 0:
            break
        makers = [maker(number) for number in range(asked, asked + missing)]
        more = await make_rows(makers, client, done, first=asked)
        kept = [row for row in more.there if is_new(row)]
        made = Made(made.rows + kept, made.aside + more.aside, made.unanswered + more.unanswered, more.stopped)
        dropped += len(more.there) - len(kept)
        asked += missing
    if len(made.rows) >= wanted:
        made.unanswered = 0  # others took their place
    return made, dropped
