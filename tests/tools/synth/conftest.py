"""A script run as a user would run it, against an endpoint on the loopback that answers by a script."""

from __future__ import annotations

from typing import Any

import pytest
from generating import script_main
from standins.chat_server import ChatServer

from chatrlhf.tools.synth import client


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    """Waits of a hundredth, no key, and no endpoint but the one that a test names."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.005)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def serve():
    """An endpoint for a script; it is closed behind the test."""
    servers = []

    def start(script: Any, **options: Any) -> ChatServer:
        servers.append(ChatServer(script, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def command():
    """Run a script of artifacts/ in this process, asking a server; returns the exit status."""

    def run(name: str, server: ChatServer | None, *words: Any) -> int:
        where = [] if server is None else ["--base-url", server.url, "--model", "judge"]
        return script_main(name)([*map(str, words), *where])

    return run
