"""The calls of the Hugging Face hub that an upload makes, answered in this process; what came is kept for the test."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """Repositories, each with its files and whether it is private; and every request."""

    token: str
    url: str = ""
    read_only: bool = False
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def hub_server(token: str) -> Iterator[Hub]:
    """A hub that knows one token, until the block ends."""
    hub = Hub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._send(401, {"error": "who is this?"})
        if self.path == "/api/whoami-v2":
            return self._send(200, {"name": "me", "type": "user"})
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if self.hub.read_only and "repos/create" in self.path:
            # With what was sent, as a proxy on the way might: it must not end on the user's terminal.
            told = f"{self.headers.get('Authorization')} may not write"
            return self._send(403, {"error": told}, {"X-Error-Message": told})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        name = "/".join(self.path.split("/")[3:5])
        if name not in self.hub.files:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if "/preupload/" in self.path:
            asked = [each["path"] for each in json.loads(body)["files"]]
            told = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in asked]
            return self._send(200, {"files": told})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self._send(200, {"commitUrl": f"{self.hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        listed = [{"rfilename": file} for file in self.hub.files[name]]
        self._send(200, {"id": name, "private": self.hub.private[name], "siblings": listed, "tags": []})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = {"url": f"{self.hub.url}/{name}"}
        if name in self.hub.files:
            return self._send(409, url | {"error": "You already created this model repo"})
        self.hub.files[name] = {".gitattributes": b""}
        self.hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
        self._send(200, url)

    def _send(self, status: int, values: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        data = json.dumps(values).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words: Any) -> None:
        """Nothing on the terminal."""
