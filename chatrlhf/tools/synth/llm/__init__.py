"""Texts from a language model, an endpoint's or one on this machine, behind one interface."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    messages: tuple[Message, ...]
    temperature: float
    max_tokens: int  # of the reply
    nth: int = 0  # which of several replies to the same messages this one is
    choices: tuple[str, ...] = ()  # a local model replies with one of them; an endpoint is not bound

    def key(self, model: str) -> str:
        """Names the request among all others of any run: equal keys, equal questions to the same model."""
        text = json.dumps([model, asdict(self)], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass(frozen=True)
class Reply:
    """What came back, and what it took in tokens."""

    text: str
    prompt_tokens: int | None = None  # where the endpoint did not count
    completion_tokens: int | None = None
    finished: bool = True  # ended by the model, not cut at max_tokens
    refusal: str | None = None  # why there is no text, where the model or its owner declined


class TryAgain(Exception):
    """No answer this time, for a reason that may pass."""

    def __init__(self, reason: str, wait: float | None = None, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait  # seconds that the endpoint asked for
        self.unreachable = unreachable  # no one was there


class NoAnswer(Exception):
    """There will be no answer to this request; the others may do well."""


class TextGenerator(Protocol):
    """A model that answers requests; many may be asked at once."""

    model: str

    async def reply(self, request: Request) -> Reply:
        """Raises TryAgain, NoAnswer, or GenerationError, after which asking on is of no use."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...
