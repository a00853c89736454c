"""Asking: each question once, tries and waits, and limits that are never exceeded."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from chatrlhf.errors import GenerationError
from chatrlhf.tools.synth import client
from chatrlhf.tools.synth.client import LimitReached, Limits, LLMClient, Price, most_tokens
from chatrlhf.tools.synth.journal import Journal
from chatrlhf.tools.synth.llm import Message, NoAnswer, Reply, Request, TryAgain


class Generator:
    """Answers by a function of the request and of how often it was asked before."""

    model, max_batch_size = "m", None

    def __init__(self, answer=lambda request, before: Reply("yes", 10, 2), delay=0.0) -> None:
        self.answer, self.delay = answer, delay
        self.asked: Counter[Request] = Counter()
        self.times: list[float] = []
        self.now = self.most = 0

    async def reply(self, request: Request) -> Reply:
        before = self.asked[request]
        self.asked[request] += 1
        self.times.append(time.monotonic())
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.delay)
            return self.answer(request, before)
        finally:
            self.now -= 1

    async def close(self) -> None:
        pass


def question(text: str, max_tokens: int = 10, **options) -> Request:
    return Request((Message("user", text),), 0.5, max_tokens, **options)


@pytest.fixture
def ask(tmp_path):
    """Ask all at once; exceptions come back instead of answers."""

    def ask(generator, requests, limits=None, price=None, path="x.journal.jsonl"):
        async def main(journal):
            client = LLMClient(generator, journal, limits or Limits(), price)
            return await asyncio.gather(*map(client.ask, requests), return_exceptions=True), client

        with Journal(tmp_path / path) as journal:
            return asyncio.run(main(journal))

    return ask


def test_no_more_are_asked_at_once_than_the_limit(ask):
    generator = Generator(delay=0.01)
    answers, client = ask(generator, [question(str(i)) for i in range(20)], Limits(concurrency=4))
    assert [answer.text for answer in answers] == ["yes"] * 20
    assert generator.most == 4
    assert (client.spent.sent, client.spent.answered, client.spent.prompt_tokens) == (20, 20, 200)


def test_the_first_goes_alone(ask):
    generator = Generator(delay=0.03)
    ask(generator, [question(str(i)) for i in range(4)])
    assert generator.times[1] - generator.times[0] >= 0.03
    slow = Generator(delay=client.FIRST_ALONE + 0.3)
    ask(slow, [question(str(i)) for i in range(4)], path="slow.journal.jsonl")
    assert slow.times[1] - slow.times[0] < client.FIRST_ALONE + 0.2  # not until it is answered


def test_the_same_question_is_sent_once_and_never_again(ask):
    generator = Generator(delay=0.01)
    answers, _ = ask(generator, [question("a")] * 5 + [question("a", nth=1)])
    assert [answer.text for answer in answers] == ["yes"] * 6
    assert generator.asked == {question("a"): 1, question("a", nth=1): 1}
    answers, client = ask(generator, [question("a"), question("b")])
    assert generator.asked[question("a")] == 1
    assert (client.spent.sent, client.spent.remembered) == (1, 1)


@pytest.mark.parametrize(
    "other",
    [
        question("b"),
        question("a", 11),
        question("a", nth=1),
        question("a", choices=("1",)),
        Request((Message("user", "a"),), 0.6, 10),
        Request((Message("system", "a"),), 0.5, 10),
        Request((Message("user", "a"), Message("user", "")), 0.5, 10),
    ],
)
def test_another_question_has_another_key(other):
    assert other.key("m") != question("a").key("m")
    assert question("a").key("n") != question("a").key("m")


def test_what_fails_is_tried_again(ask):
    def answer(request, before):
        if before < 3:
            raise TryAgain("500")
        return Reply("at last", 1, 1)

    generator = Generator(answer)
    (answered,), client = ask(generator, [question("a")])
    assert answered.text == "at last"
    assert (client.spent.sent, client.spent.answered) == (4, 1)


def test_a_request_that_always_fails_has_no_answer_and_the_others_do(ask):
    def answer(request, before):
        if request.messages[0].content == "bad":
            raise TryAgain("500: no")
        return Reply("yes", 1, 1)

    generator = Generator(answer)
    answers, _ = ask(generator, [question(text) for text in ("a", "bad", "b")], Limits(retries=2))
    assert isinstance(answers[1], NoAnswer)
    assert "no answer after 3 tries (500: no)" in str(answers[1])
    assert generator.asked[question("bad")] == 3
    assert [answers[i].text for i in (0, 2)] == ["yes", "yes"]
    # And it was not written down as answered: another run asks it again.
    generator.answer = lambda request, before: Reply("now", 1, 1)
    answers, _ = ask(generator, [question("bad")])
    assert answers[0].text == "now"


def test_nobody_is_sent_before_the_endpoint_said(ask):
    def answer(request, before):
        if request.messages[0].content == "0" and not before:
            raise TryAgain("429", wait=0.2)
        return Reply("yes", 1, 1)

    generator = Generator(answer)
    ask(generator, [question(str(i)) for i in range(5)], Limits(concurrency=5))
    assert all(later - generator.times[0] >= 0.2 for later in generator.times[1:])
    assert len(generator.times) == 6


def test_an_endpoint_that_is_not_there_is_not_waited_for_long(ask):
    def answer(request, before):
        raise TryAgain("connection refused", unreachable=True)

    generator = Generator(answer)
    answers, _ = ask(generator, [question("a")])
    assert isinstance(answers[0], GenerationError)
    assert "cannot be reached (connection refused)" in str(answers[0])
    assert generator.asked[question("a")] == client.TRIES_TO_REACH


def test_an_endpoint_that_has_died_ends_the_run(ask):
    dead = []

    def answer(request, before):
        if dead or request.messages[0].content == "3":
            dead.append(1)
            raise TryAgain("503", unreachable=True)
        return Reply("yes", 1, 1)

    generator = Generator(answer)
    answers, _ = ask(generator, [question(str(i)) for i in range(10)], Limits(concurrency=1, retries=1))
    assert [type(answer) for answer in answers[:3]] == [Reply] * 3
    # Three requests were given up while no one was answered.
    kinds = Counter(type(answer) for answer in answers[3:])
    assert kinds == {NoAnswer: 2, GenerationError: 5}
    assert any("does not answer any more (503)" in str(answer) for answer in answers)


def test_stubborn_requests_at_the_end_do_not_end_a_run_in_which_others_were_answered(ask):
    def answer(request, before):
        if request.messages[0].content.startswith("bad"):
            raise TryAgain("500")
        return Reply("yes", 1, 1)

    texts = [*(f"bad {i}" for i in range(5)), *map(str, range(5))]
    answers, _ = ask(Generator(answer), [question(text) for text in texts], Limits(retries=1))
    assert [type(answer) for answer in answers] == [NoAnswer] * 5 + [Reply] * 5


def test_stubborn_requests_among_others_that_are_answered_do_not_end_a_run(tmp_path):
    def answer(request, before):
        if request.messages[0].content.startswith("bad"):
            raise TryAgain("500")
        return Reply("yes", 1, 1)

    async def one_after_the_other(journal):
        client = LLMClient(Generator(answer), journal, Limits(concurrency=1, retries=1))
        kinds = []
        for text in ("0", "bad 1", "1", "bad 2", "2", "bad 3", "3", "bad 4"):
            try:
                kinds.append(type(await client.ask(question(text))))
            except (NoAnswer, GenerationError) as error:
                kinds.append(type(error))
        return kinds

    with Journal(tmp_path / "x.journal.jsonl") as journal:
        assert asyncio.run(one_after_the_other(journal)) == [Reply, NoAnswer] * 4


def test_settings_that_no_request_survives_end_the_run(ask):
    def answer(request, before):
        raise NoAnswer("400: unknown field")

    generator = Generator(answer)
    answers, _ = ask(generator, [question(str(i)) for i in range(30)], Limits(concurrency=1))
    assert [type(answer) for answer in answers[:10]] == [NoAnswer] * 9 + [GenerationError]
    assert "no request was accepted so far: 400: unknown field" in str(answers[9])


@pytest.mark.parametrize("concurrency", [1, 7])
def test_no_more_requests_are_sent_than_allowed(ask, concurrency):
    def answer(request, before):
        if request.messages[0].content == "1" and not before:
            raise TryAgain("500")  # a try counts
        return Reply("yes", 1, 1)

    generator = Generator(answer, delay=0.001)
    limits = Limits(concurrency=concurrency, max_requests=6)
    answers, client = ask(generator, [question(str(i)) for i in range(10)], limits)
    assert sum(generator.asked.values()) == client.spent.sent == 6
    assert sum(isinstance(answer, Reply) for answer in answers) == 5
    assert all("--max-requests 6" in str(answer) for answer in answers if not isinstance(answer, Reply))


@pytest.mark.parametrize("concurrency", [1, 8])
def test_the_cost_is_never_exceeded(ask, concurrency):
    # At most: 20 tokens in ("abcd" and what is around it) and 10 out, at 1 and 2 dollars a token: 40 dollars. What
    # comes back costs 10 + 2 * 2 = 14.
    assert most_tokens(question("abcd")) == (20, 10)
    price = Price(1e6, 2e6)
    generator = Generator(delay=0.001)
    limits = Limits(concurrency=concurrency, max_cost=100)
    answers, client = ask(generator, [question(f"abc{i}") for i in range(10)], limits, price)
    # 5 cost 70; a sixth could bring it to 110, although it would have been 84.
    assert sum(isinstance(answer, Reply) for answer in answers) == 5
    assert client.spent.cost == 70
    assert all(isinstance(answer, (Reply, LimitReached)) for answer in answers)


def test_a_cost_that_nobody_counted_is_the_most_it_can_be(ask):
    _, client = ask(Generator(lambda *_: Reply("yes")), [question("abcd")], price=Price(1e6, 2e6))
    assert client.spent.cost == 40


def test_waits_double_and_are_not_all_the_same(ask, monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    def answer(request, before):
        raise TryAgain("500")

    monkeypatch.setattr(client, "FIRST_WAIT", 0.5)
    monkeypatch.setattr(client, "asyncio", _Asyncio(sleep))
    ask(Generator(answer), [question("a")], Limits(retries=8))
    bounds = [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert len(waits) == 8
    assert all(0.75 * bound <= wait <= bound for wait, bound in zip(waits, bounds, strict=True))
    assert len({wait / bound for wait, bound in zip(waits, bounds, strict=True)}) > 4


class _Asyncio:
    """asyncio with another sleep."""

    def __init__(self, sleep) -> None:
        self.sleep = sleep

    def __getattr__(self, name):
        return getattr(asyncio, name)
