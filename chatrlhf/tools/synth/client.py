"""Asking a model many things at once: limits, tries, waits, and the journal in front of it all."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from chatrlhf.errors import GenerationError
from chatrlhf.tools.synth.journal import Journal
from chatrlhf.tools.synth.llm import NoAnswer, Reply, Request, TextGenerator, TryAgain

FIRST_ALONE = 0.15  # seconds in which the first request shows whether key and model are right
FIRST_WAIT, LONGEST_BACK_OFF = 0.5, 30.0  # seconds between tries, doubled each time
TRIES_TO_REACH = 3  # of an endpoint that has not answered anybody yet
GIVE_UP = 3  # requests without an answer while no one had one
REFUSED_AT_FIRST = 10  # requests that the endpoint refuses before it has answered any
BYTES_PER_TOKEN = 4  # of English text, roughly


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """What so many tokens cost, in US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Limits:
    """What one run may do."""

    concurrency: int = 8  # requests at once
    retries: int = 6  # tries of a request after its first
    max_requests: int | None = None  # sent, tries included
    max_cost: float | None = None  # US dollars


@dataclass
class Usage:
    """What this run has sent and got; an answer without a count of tokens is counted by its length."""

    sent: int = 0
    answered: int = 0
    remembered: int = 0  # answers that the journal had
    prompt_tokens: float = 0
    completion_tokens: float = 0
    cost: float = 0.0


class LimitReached(Exception):
    """This run may not ask any more; what it has is kept."""


class LLMClient:
    """Asks a generator, each question once.

    An answer that the journal holds is taken from there; the same question asked twice at a time is sent once. What
    fails for a reason that may pass is tried again, after as long as the endpoint says, and no one else is sent to it
    before that; otherwise after twice the time at each try.
    """

    def __init__(
        self,
        generator: TextGenerator,
        journal: Journal,
        limits: Limits,
        price: Price | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            tell: is given a line about each wait.
        """
        self.generator, self.journal, self.limits, self.price, self.tell = generator, journal, limits, price, tell
        self.spent = Usage()
        self._semaphore = asyncio.Semaphore(limits.concurrency)
        self._in_flight: dict[str, asyncio.Future[Reply]] = {}
        self._flying, self._reserved = 0, 0.0
        self._settled = asyncio.Condition()
        self._not_before = 0.0
        self._first_sent: float | None = None
        self._first_over = asyncio.Event()
        self._given_up = self._refused = 0
        self._over: GenerationError | None = None  # why no one is asked any more

    async def ask(self, request: Request) -> Reply:
        """The answer to a request.

        Raises:
            NoAnswer: the endpoint has none for this request.
            LimitReached: asking would go beyond the limits of the run.
            GenerationError: no request can be answered.
        """
        key = request.key(self.generator.model)
        if (known := self.journal.replies.get(key)) is not None:
            self.spent.remembered += 1
            return known
        if key in self._in_flight:
            return await asyncio.shield(self._in_flight[key])
        future = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            reply = await self._ask(key, request)
        except BaseException as error:
            if not future.done():
                future.set_exception(error if isinstance(error, Exception) else LimitReached())
                future.exception()  # no one else may have asked
            raise
        else:
            future.set_result(reply)
            return reply
        finally:
            del self._in_flight[key]

    async def _ask(self, key: str, request: Request) -> Reply:
        """Try until there is an answer, and write it down."""
        reason, answered = "", 0
        for attempt in range(self.limits.retries + 1):
            try:
                async with self._semaphore:
                    reply = await self._send(request)
            except TryAgain as error:
                reason = str(error)
                if error.unreachable and not self.spent.answered and attempt + 1 >= TRIES_TO_REACH:
                    raise GenerationError(
                        f"the endpoint cannot be reached ({reason}); correct --base-url, or start it"
                    ) from None
                answered = answered if attempt else self.spent.answered
                if attempt < self.limits.retries:
                    await self._back_off(attempt, error.wait, reason)
            else:
                self.journal.add(key, reply)
                self._count(request, reply)
                return reply
        self._given_up += self.spent.answered == answered  # since this request failed for the first time
        if self._given_up >= GIVE_UP:
            raise GenerationError(
                f"the endpoint does not answer any more ({reason}); what it has answered is kept, and the same command "
                "continues from there"
            )
        raise NoAnswer(f"no answer after {self.limits.retries + 1} tries ({reason})")

    async def _send(self, request: Request) -> Reply:
        """One try."""
        await self._wait_for_turn()
        if self._over is not None:
            raise self._over
        reserved = await self._reserve(request)
        try:
            return await self.generator.reply(request)
        except NoAnswer as error:
            self._refused += 1
            if self._refused >= REFUSED_AT_FIRST and not self.spent.answered:
                raise GenerationError(f"no request was accepted so far: {error}") from None
            raise
        except GenerationError as error:
            self._over = error
            raise
        finally:
            self._first_over.set()
            await self._release(reserved)

    async def _wait_for_turn(self) -> None:
        """Until no one has been told to wait, and the first request has shown that there is an endpoint."""
        if self._first_sent is None:
            self._first_sent = time.monotonic()
        elif not self._first_over.is_set():
            rest = self._first_sent + FIRST_ALONE - time.monotonic()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._first_over.wait(), max(rest, 0))
        while (rest := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(rest)

    async def _back_off(self, attempt: int, asked: float | None, reason: str) -> None:
        if asked is not None:
            self._not_before = max(self._not_before, time.monotonic() + asked)
            self.tell(f"waiting {asked:.0f} s, as the endpoint asks ({reason})")
            await asyncio.sleep(asked)
        else:
            wait = min(FIRST_WAIT * 2**attempt, LONGEST_BACK_OFF)
            await asyncio.sleep(wait * random.uniform(0.75, 1.0))  # so that not all come back at once

    async def _reserve(self, request: Request) -> float:
        """Make sure that the request cannot exceed the limits; returns the most that it can cost."""
        most = self.price.of(*most_tokens(request)) if self.price else 0.0
        limits = self.limits
        async with self._settled:
            while limits.max_cost is not None and self.spent.cost + self._reserved + most > limits.max_cost:
                if not self._flying:
                    raise LimitReached(f"--max-cost {limits.max_cost:g}: one more request could exceed it")
                await self._settled.wait()
            if limits.max_requests is not None and self.spent.sent >= limits.max_requests:
                raise LimitReached(f"--max-requests {limits.max_requests}: that many were sent")
            self.spent.sent += 1
            self._flying, self._reserved = self._flying + 1, self._reserved + most
        return most

    async def _release(self, reserved: float) -> None:
        async with self._settled:
            self._flying -= 1
            self._reserved = self._reserved - reserved if self._flying else 0.0
            self._settled.notify_all()

    def _count(self, request: Request, reply: Reply) -> None:
        spent = self.spent
        guess = sum(len(each.content.encode("utf-8", "replace")) for each in request.messages) / BYTES_PER_TOKEN
        prompt = guess if reply.prompt_tokens is None else reply.prompt_tokens
        completion = reply.completion_tokens
        if completion is None:
            completion = len(reply.text.encode("utf-8", "replace")) / BYTES_PER_TOKEN
        spent.answered += 1
        spent.prompt_tokens += prompt
        spent.completion_tokens += completion
        if self.price:
            counted = reply.prompt_tokens is not None and reply.completion_tokens is not None
            spent.cost += self.price.of(*((prompt, completion) if counted else most_tokens(request)))
        self._given_up = 0


def most_tokens(request: Request) -> tuple[int, int]:
    """The most tokens that a request and its reply can be: no token is shorter than a byte."""
    prompt = sum(len(each.content.encode("utf-8", "replace")) + 16 for each in request.messages)
    return prompt, request.max_tokens
