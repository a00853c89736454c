"""Endpoints: nothing goes to a host or scheme that was not named, no answer is endless, no password is shown."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hostile import line_about
from standins.chat_server import Answer, ChatServer

from chatrlhf.errors import RewardError
from chatrlhf.rl.http_reward import http_reward
from chatrlhf.rl.rewards import resolve_reward_fn
from chatrlhf.rollout.vllm import server_settings, wait_for_server
from chatrlhf.runtime.http_client import fetch
from chatrlhf.tools.synth.llm import Message, Request
from chatrlhf.tools.synth.llm.openai_endpoint import Endpoint, served_model

PASSWORD = "pass-word-0123456789"


class Server:
    """An endpoint that answers as it is told; ``asked`` are the requests that came."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.asked.append((self.command, self.path, dict(self.headers), body))
                status, headers, write = outer.answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    write(self.wfile)
                except OSError:
                    outer.hung_up.set()

            do_GET = do_POST = answer

            def log_message(self, *_) -> None:
                pass

        self.hung_up = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        self.place = f"127.0.0.1:{self.server.server_port}"

    def __setitem__(self, path: str, answer) -> None:
        self.answers[path] = answer

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    """Between two tries of an endpoint."""
    monkeypatch.setattr("chatrlhf.rl.http_reward.PAUSES", (0.0, 0.0))


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    both = Server(), Server()
    yield both
    for server in both:
        server.close()


def text(content: bytes):
    return 200, {}, lambda file: file.write(content)


def redirect(status: int, place: str):
    return status, {"Location": place}, lambda file: None


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_to_another_host(servers, status):
    named, other = servers
    other["/scores"] = text(b"[1.0]")
    named["/scores"] = redirect(status, f"http://{other.place}/scores")
    post = http_reward(f"http://{named.place}/scores")
    assert f"redirects ({status}) to another place, http://{other.place}/scores" in line_about(
        lambda: post(["a"], ["b"])
    )
    assert not other.asked and len(named.asked) == 1


@pytest.mark.parametrize(
    "place", ["file:///etc/passwd", "ftp://127.0.0.1/x", "https://{place}/x", "data:,[1]", "//evil.test/x"]
)
def test_no_redirect_to_another_scheme(servers, place):
    named, _ = servers
    named["/scores"] = redirect(307, place.format(place=named.place))
    post = http_reward(f"http://{named.place}/scores")
    assert "to another place" in line_about(lambda: post(["a"], ["b"]))


def test_a_redirect_that_stays_repeats_the_request(servers):
    named, _ = servers
    named["/scores"], named["/scores/"] = redirect(307, "/scores/"), text(b"[1.5]")
    assert http_reward(f"http://me:{PASSWORD}@{named.place}/scores")(["a"], ["b"]) == [1.5]
    (_, _, first, body), (command, _, second, again) = named.asked
    assert command == "POST" and body == again == json.dumps({"prompts": ["a"], "completions": ["b"]}).encode()
    assert first["Authorization"] == second["Authorization"]
    assert first["Authorization"] == "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode()


def test_redirects_end(servers):
    named, _ = servers
    named["/scores"] = redirect(307, "/scores")
    assert "redirects more than 5 times" in line_about(
        lambda: http_reward(f"http://{named.place}/scores")(["a"], ["b"])
    )
    named["/scores"] = redirect(302, "/elsewhere")
    assert "without what was asked" in line_about(lambda: http_reward(f"http://{named.place}/scores")(["a"], ["b"]))


sent: list[int] = []  # bytes of endless answers


def endless(file) -> None:
    sent.clear()
    while True:
        sent.append(file.write(b"1, " * 10000))


def slow(file) -> None:
    for _ in range(1000):
        file.write(b"1")
        file.flush()
        time.sleep(0.02)


def test_no_endless_answer(servers):
    named, _ = servers
    named["/scores"] = 200, {}, endless
    assert "its answer is longer than 1,052,672 bytes" in line_about(
        lambda: http_reward(f"http://{named.place}/scores")(["a"], ["b"])
    )
    assert named.hung_up.wait(10) and sum(sent) < 2**26  # what was read, and what lay in buffers


@pytest.mark.parametrize("length", ["100000000000", "-1", "much"])
def test_no_answer_as_long_as_it_says(servers, length):
    named, _ = servers
    named["/scores"] = 200, {"Content-Length": length}, endless
    line_about(lambda: http_reward(f"http://{named.place}/scores")(["a"], ["b"]))


def test_no_slow_answer(servers):
    named, _ = servers
    named["/scores"] = 200, {}, slow
    line = line_about(lambda: http_reward(f"http://{named.place}/scores", 0.2)(["a"], ["b"]))
    assert "was not complete after 0.2 seconds" in line


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"9" * 5000, b'{"scores": ' * 50_000, b"\xff" * 10, b"\x1f\x8b" + b"0" * 99]
)
def test_no_answer_that_breaks_its_reader(servers, body):
    named, _ = servers
    named["/scores"] = text(body)
    line_about(lambda: http_reward(f"http://{named.place}/scores")(["a"], ["b"]))


@pytest.mark.parametrize("how", ["refused", "error status", "no address", "bad port", "redirect", "no scores"])
def test_a_password_is_never_shown(servers, how):
    named, other = servers
    named["/error"] = 500, {}, lambda file: None
    named["/redirect"] = redirect(307, f"http://you:{PASSWORD}@{other.place}/scores?token={PASSWORD}")
    named["/words"] = text(b'"words"')
    url = {
        "refused": "127.0.0.1:9/scores",
        "error status": f"{named.place}/error",
        "no address": "[::1/scores",
        "bad port": "127.0.0.1:port/scores",
        "redirect": f"{named.place}/redirect",
        "no scores": f"{named.place}/words",
    }[how]
    source = resolve_reward_fn(f"http://me:{PASSWORD}@{url}")
    assert PASSWORD not in source.name and "***@" in source.name
    with pytest.raises(RewardError) as raised:
        source.texts(["a"], ["b"])
    assert PASSWORD not in str(raised.value) and PASSWORD not in repr(raised.value)
    assert "***@" in str(raised.value)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x"])
def test_other_schemes_are_no_endpoints(url):
    with pytest.raises((OSError, ValueError)):
        fetch(url, 1000, 1.0)
    line_about(lambda: resolve_reward_fn(url))


def test_the_server_of_vllm_has_the_same_limits(servers):
    named, other = servers
    named["/health"] = redirect(307, f"http://{other.place}/health")
    line = line_about(lambda: wait_for_server(f"http://me:{PASSWORD}@{named.place}", 0.1))
    assert "to another place" in line and PASSWORD not in line
    named["/server_info?config_format=json"] = 200, {}, endless
    with pytest.raises(OSError, match="longer than"):
        server_settings(f"http://{named.place}")
    assert not other.asked


@pytest.mark.parametrize("status", [301, 307])
def test_what_is_asked_of_a_model_goes_nowhere_else(monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-0123456789abcdef")
    with ChatServer(lambda body, before: "yes") as other:
        away = Answer(status=status, headers={"Location": f"{other.url}/chat/completions"})
        with ChatServer(lambda body, before: away) as named:

            async def ask():
                endpoint = Endpoint("judge", named.url.replace("://", f"://me:{PASSWORD}@"))
                try:
                    return await endpoint.reply(Request((Message("user", "u"),), 0.5, 7))
                finally:
                    await endpoint.close()

            line = line_about(lambda: asyncio.run(ask()))
        assert f"redirects ({status})" in line and PASSWORD not in line
        assert not other.asked and not other.keys


def test_an_unreachable_endpoint_of_a_model_shows_no_password():
    line = line_about(lambda: served_model(f"http://me:{PASSWORD}@127.0.0.1:9/v1"))
    assert "http://***@127.0.0.1:9/v1" in line
