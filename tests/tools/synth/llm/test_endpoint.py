"""The real protocol on the loopback, with everything that goes wrong on the way."""

from __future__ import annotations

import asyncio
import email.utils
import time

import pytest
from standins.chat_server import Answer, ChatServer

from chatrlhf.errors import GenerationError
from chatrlhf.tools.synth.llm import Message, NoAnswer, Reply, Request, TryAgain
from chatrlhf.tools.synth.llm.openai_endpoint import Endpoint, _seconds, refuse_gone, served_model

FILTERED = "the endpoint's content filter stopped it"
KEY = "sk-a-secret-that-no-one-may-see"


@pytest.fixture
def ask(monkeypatch):
    """One request to an endpoint that answers like that; returns the reply or what was raised, and the server."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    request = Request((Message("system", "s"), Message("user", "u")), 0.5, 7)

    def ask(answer, timeout=5.0):
        async def main(url):
            endpoint = Endpoint("judge", url, timeout=timeout)
            try:
                return await endpoint.reply(request)
            except (TryAgain, NoAnswer, GenerationError) as error:
                return error
            finally:
                await endpoint.close()

        with ChatServer(lambda body, before: answer) as server:
            return asyncio.run(main(server.url)), server

    return ask


def test_a_reply_and_what_was_asked(ask):
    reply, server = ask(Answer("a text", usage=(11, 3)))
    assert reply == Reply("a text", 11, 3)
    assert server.asked == [
        {
            "model": "judge",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "temperature": 0.5,
            "max_tokens": 7,
        }
    ]
    assert server.keys == [f"Bearer {KEY}"]


def test_openais_own_endpoint_knows_the_limit_by_its_new_name(ask, monkeypatch):
    with ChatServer(lambda body, before: "yes") as server:
        monkeypatch.setattr("chatrlhf.tools.synth.llm.openai_endpoint.OPENAI", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        asyncio.run(Endpoint("gpt-6-luna").reply(Request((Message("user", "u"),), 0.5, 7)))
    assert server.asked[0]["max_completion_tokens"] == 7
    assert "max_tokens" not in server.asked[0]


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (Answer("cut", finish_reason="length"), Reply("cut", 20, 5, finished=False)),
        (Answer("uncounted", usage=None), Reply("uncounted")),
        (Answer(None, refusal="I can't"), Reply("", 20, 5, refusal="I can't")),
        (Answer("x", finish_reason="content_filter"), Reply("x", 20, 5, refusal=FILTERED)),
        (Answer(None, finish_reason="length"), Reply("", 20, 5, finished=False)),
    ],
)  # fmt: skip
def test_replies_of_all_kinds(ask, answer, reply):
    assert ask(answer)[0] == reply


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("slow down", status=429), "429: .*slow down"),
        (Answer("broken", status=500), "500: .*broken"),
        (Answer("gone", status=503), "503"),
        (Answer(cut=True, text="a" * 500), "without sending complete message body"),
        (Answer(drop=True), "disconnected"),
        (Answer(raw=b'{"choices": [{"mess'), "cannot be read"),
        (Answer(raw=b"<html>a proxy's page</html>"), "cannot be read"),
        (Answer(raw=b"\xff\xfe"), "cannot be read"),
        (Answer(raw=b""), "cannot be read"),
        (Answer(raw=b"[]"), "no choices"),
        (Answer(raw=b"null"), "no choices"),
        (Answer(raw=b'"text"'), "no choices"),
        (Answer(raw=b'{"choices": [{"message": null}]}'), "no choices"),
        (Answer(raw=b'{"choices": [{"message": {"content": 3}}]}'), "no text"),
        (Answer(choices=False), "no choices"),
    ],
)
def test_what_may_pass_is_to_be_tried_again(ask, answer, reason):
    error, server = ask(answer)
    assert isinstance(error, TryAgain), error
    with pytest.raises(TryAgain, match=reason):
        raise error
    assert error.wait is None and not error.unreachable
    assert len(server.asked) == 1  # the library has not tried by itself


def test_a_time_out(ask):
    error, _ = ask(Answer("late", delay=1), timeout=0.2)
    assert isinstance(error, TryAgain)
    assert str(error) == "no answer within 0.2 s"


def test_an_endpoint_that_sends_a_byte_now_and_then_runs_out_of_time_too(ask):
    began = time.monotonic()
    error, _ = ask(Answer("text", trickle=0.02), timeout=0.3)  # 250 bytes take five seconds
    assert str(error) == "no answer within 0.3 s"
    assert time.monotonic() - began < 3


def test_nobody_there():
    async def main():
        return await Endpoint("judge", "http://127.0.0.1:9/v1").reply(Request((Message("user", "u"),), 0, 1))

    with pytest.raises(TryAgain) as caught:
        asyncio.run(main())
    assert caught.value.unreachable


def test_retry_after_in_seconds_and_as_a_date(ask):
    assert ask(Answer("", status=429, headers={"Retry-After": "7"}))[0].wait == 7
    assert ask(Answer("", status=503, headers={"Retry-After": "0.5"}))[0].wait == 0.5
    assert ask(Answer("", status=429, headers={"Retry-After-Ms": "1500", "Retry-After": "9"}))[0].wait == 1.5
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 17 < ask(Answer("", status=429, headers={"Retry-After": date}))[0].wait <= 20
    assert ask(Answer("", status=429, headers={"Retry-After": "soon"}))[0].wait is None
    assert _seconds({"retry-after": "nan"}) is None
    assert _seconds({"retry-after": "-3"}) == 0


def test_a_wait_that_nobody_waits_for_ends_the_run(ask):
    error, _ = ask(Answer("daily quota", status=429, headers={"Retry-After": "3600"}))
    assert isinstance(error, GenerationError)
    assert "asks to wait 3,600 s" in str(error)


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_what_meets_every_request_ends_the_run_and_shows_no_key(ask, status):
    error, _ = ask(Answer(f"Incorrect key: {KEY}. You gave {KEY}", status=status))
    assert isinstance(error, GenerationError)
    assert KEY not in str(error) and str(status) in str(error)
    assert KEY not in repr(error)


def test_money_that_is_spent_ends_the_run(ask):
    body = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    error, _ = ask(Answer(status=429, raw=body))
    assert isinstance(error, GenerationError)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_refused_alone(ask, status):
    error, _ = ask(Answer(f"too long {KEY}", status=status))
    assert isinstance(error, NoAnswer)
    assert "too long [key]" in str(error)


@pytest.mark.parametrize(
    "name", ["davinci-003", "text-davinci-003", "text-davinci-002", "davinci", "curie", "text-ada-001"]
)
def test_old_models_fail_with_what_to_use_instead(name):
    for base_url in (None, "http://localhost:1/v1"):
        with pytest.raises(GenerationError, match=r"shut down.*--base-url.*google/flan-t5-xl"):
            refuse_gone(name, base_url)


def test_a_name_that_others_lend_to_their_models_is_theirs():
    with pytest.raises(GenerationError):
        refuse_gone("gpt-3.5-turbo-0125")
    refuse_gone("gpt-3.5-turbo", "http://localhost:1/v1")
    for name in ("gpt-6-luna", "adapter", "ada-lovelace/davinci-llama", "meta-llama/Llama-3.1-8B-Instruct"):
        refuse_gone(name)


def test_a_key_comes_from_the_environment_and_is_asked_for(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(GenerationError, match="OPENAI_API_KEY"):
        Endpoint("gpt-6-luna")
    with pytest.raises(GenerationError, match="no address"):
        Endpoint("judge", "localhost:8000")
    Endpoint("judge", "http://localhost:8000/v1")  # one's own needs none
    monkeypatch.setenv("OTHER", KEY)
    Endpoint("gpt-6-luna", key_name="OTHER")


def test_the_only_model_of_an_endpoint():
    with ChatServer(lambda *_: "", models=("one",)) as server:
        assert served_model(server.url) == "one"
    with (
        ChatServer(lambda *_: "", models=("one", "two")) as server,
        pytest.raises(GenerationError, match="has one, two"),
    ):
        served_model(server.url)
    with ChatServer(lambda *_: "", models=()) as server, pytest.raises(GenerationError, match="lists no models"):
        served_model(server.url)
    with pytest.raises(GenerationError, match="did not say"):
        served_model("http://127.0.0.1:9/v1")
