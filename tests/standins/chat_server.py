"""An OpenAI-compatible endpoint on the loopback that answers by a script, faults included."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Answer:
    """What comes back for one request."""

    text: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0  # seconds before the first byte
    raw: bytes | None = None  # instead of a chat completion
    trickle: float = 0.0  # seconds between two bytes of the body
    cut: bool = False  # the connection ends in the middle of the body
    drop: bool = False  # it ends before the first byte
    finish_reason: str = "stop"
    refusal: str | None = None
    usage: tuple[int, int] | None = (20, 5)
    choices: bool = True


Script = Callable[[dict[str, Any], int], Answer | str]


class ChatServer:
    """Serves until closed.

    ``asked`` lists each request's body in the order in which they came, ``keys`` the Authorization headers, ``most``
    is how many were worked on at once. The script gets a body and how often the same one has come before.
    """

    def __init__(self, script: Script, port: int = 0, models: tuple[str, ...] = ("judge",)) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.answered: list[str] = []  # bodies whose answer was sent whole
        self.now = self.most = 0
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self.send(200, json.dumps({"object": "list", "data": [{"id": name} for name in models]}).encode(), {})

            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                with outer._lock:
                    outer.asked.append(json.loads(text))
                    outer.keys.append(self.headers.get("Authorization"))
                    outer.times.append(time.monotonic())
                    before = outer._seen[text]
                    outer._seen[text] += 1
                    outer.now += 1
                    outer.most = max(outer.most, outer.now)
                try:
                    answer = script(json.loads(text), before)
                    answer = Answer(answer) if isinstance(answer, str) else answer
                    time.sleep(answer.delay)
                finally:
                    with outer._lock:
                        outer.now -= 1
                if answer.drop:
                    self.close_connection = True
                    return
                body = outer.body(answer) if answer.raw is None else answer.raw
                try:
                    self.send(answer.status, body, answer.headers, answer.cut, answer.trickle)
                except OSError:
                    return  # the other side was killed
                with outer._lock:
                    outer.answered.append(text)

            def send(
                self, status: int, body: bytes, headers: dict[str, str], cut: bool = False, trickle: float = 0.0
            ) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                for byte in body if trickle else b"":
                    self.wfile.write(bytes([byte]))
                    time.sleep(trickle)
                if not trickle:
                    self.wfile.write(body[: len(body) // 2] if cut else body)
                if cut:
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: Any) -> None:  # a client that was killed
                pass

        self._server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @staticmethod
    def body(answer: Answer) -> bytes:
        if answer.status != 200:
            return json.dumps({"error": {"message": answer.text, "type": "error", "code": None}}).encode()
        message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason}
        content: dict[str, Any] = {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 0,
            "model": "judge",
            "choices": [choice] if answer.choices else [],
        }
        if answer.usage is not None:
            prompt, completion = answer.usage
            content["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        return json.dumps(content).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> ChatServer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
