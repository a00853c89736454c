"""Replies to prompts: in the manner of a user's examples, or as good or as bad as is wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chatrlhf.conversation import Conversation, Prompt
from chatrlhf.tools.synth.clean_reply import message, written_by
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.instructions import fill
from chatrlhf.tools.synth.llm import Message, Request
from chatrlhf.tools.synth.row_makers import RowMaker

SHOWN = 4  # examples in a request
LEAST_EXAMPLES = 10  # to augment a user's own
OF_QUALITY = (
    "{reward}\n\nThese replies were scored like that:\n\n{examples}\n\n"
    "Now write a reply to the following request that would be scored {score} of {high}, with the faults that go with "
    "such a score and without naming them. Write the reply only.\n\nRequest:\n{user_input}\n\nReply:"
)


@dataclass(frozen=True)
class Example:
    """A prompt with a reply, and its score where it has one."""

    prompt: str
    completion: str
    score: float | None = None


def in_the_manner_of(
    number: int, prompt: str, examples: Sequence[Example], seed: int, temperature: float, max_tokens: int
) -> RowMaker[Conversation]:
    """How a prompt is answered by a model that has just seen itself answer a few of the examples."""
    shown = random.Random(f"{seed}/{number}").sample(examples, min(SHOWN, len(examples)))
    told = [part for each in shown for part in (Message("user", each.prompt), Message("assistant", each.completion))]
    request = Request((*told, Message("user", prompt)), temperature, max_tokens)
    return _answered(prompt, request)


def of_quality(
    number: int,
    prompt: str,
    score: float,
    scale: tuple[float, float],
    rules: str,
    examples: Sequence[Example],
    seed: int,
    temperature: float,
    max_tokens: int,
) -> RowMaker[Conversation]:
    """How a prompt is answered as well as a score says; whether it was, a judge has to find out.

    Args:
        rules: what a judge of the replies is told.
    """
    shown = random.Random(f"{seed}/{number}").sample(examples, min(SHOWN, len(examples)))
    texts = [f"Request:\n{each.prompt}\nReply:\n{each.completion}\nScore: {each.score:g}" for each in shown]
    values = {"score": f"{score:g}", "high": f"{scale[1]:g}", "examples": "\n\n".join(texts), "user_input": prompt}
    request = Request((Message("user", fill(OF_QUALITY, {"reward": rules, **values})),), temperature, max_tokens)
    return _answered(prompt, request)


def _answered(prompt: str, request: Request) -> RowMaker[Conversation]:
    async def make(client: LLMClient) -> Conversation:
        completion = message(await client.ask(request), "the reply")
        return Conversation(Prompt.of(prompt), completion=completion, provenance=written_by(client.generator.model))

    return make
