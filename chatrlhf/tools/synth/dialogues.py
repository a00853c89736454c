"""Dialogues with two sides: the model plays a person who wants something, and the assistant who answers.

Each side sees the dialogue as its own: what the one has said is what the other was told.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from chatrlhf.conversation import Conversation, Prompt, Turn
from chatrlhf.tools.synth.clean_reply import message, written_by
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.instructions import fill
from chatrlhf.tools.synth.llm import Message, Request
from chatrlhf.tools.synth.row_makers import RowMaker
from chatrlhf.tools.synth.topics import MANNERS

PERSON = "{template}\n\nThe subject is: {topic}. The person {manner}.\n\n"
FIRST = "You play the person. Write the person's first message to the assistant, and nothing else."
NEXT = "Write the person's next message, and nothing else."
ASSISTANT = "{template}\n\nYou are the assistant. Write the assistant's next reply, and nothing else."
TURN_TOKENS = 80  # of a message, for the estimate


@dataclass(frozen=True)
class Wanted:
    """A dialogue that is to be written."""

    topic: str
    manner: str
    exchanges: int  # a message of the person's and the reply to it

    @property
    def requests(self) -> int:
        """Messages, each of which is asked for."""
        return 2 * self.exchanges


def plan_dialogues(number: int, topics: Sequence[str], most_exchanges: int, seed: int) -> list[Wanted]:
    """What each of so many dialogues is about; the first ones are the same whatever their number is."""
    wanted = []
    for i in range(number):
        chance = random.Random(f"{seed}/{i}")
        wanted.append(Wanted(chance.choice(topics), chance.choice(MANNERS), chance.randint(1, most_exchanges)))
    return wanted


def tokens_of(wanted: Sequence[Wanted], template: str) -> tuple[int, int]:
    """Prompt and completion tokens that dialogues will take, roughly."""
    told = len(template) // 4 + 60
    # The i-th message is written by somebody who has read the i before it.
    prompts = sum(sum(told + i * TURN_TOKENS for i in range(each.requests)) for each in wanted)
    return prompts, sum(each.requests for each in wanted) * TURN_TOKENS


def dialogue(number: int, wanted: Wanted, template: str, temperature: float, max_tokens: int) -> RowMaker[Conversation]:
    """How a dialogue is written: message by message, by turns."""

    async def make(client: LLMClient) -> Conversation:
        turns: list[Turn] = []
        for i in range(wanted.requests):
            is_person = i % 2 == 0
            told = _person(turns, wanted, template) if is_person else _assistant(turns, template)
            # The number: dialogues on the same subject begin with the same question to the model.
            reply = await client.ask(Request(tuple(told), temperature, max_tokens, nth=number))
            what = f"{'the person' if is_person else 'the assistant'}'s message {i // 2 + 1}"
            turns.append(Turn("user" if is_person else "assistant", message(reply, what, whole=not is_person)))
        prompt = Prompt(tuple(turns[:-1]))
        return Conversation(prompt, completion=turns[-1].text, provenance=written_by(client.generator.model))

    return make


def _person(turns: Sequence[Turn], wanted: Wanted, template: str) -> list[Message]:
    texts = {"template": template, "topic": wanted.topic, "manner": wanted.manner}
    told = [Message("user", fill(PERSON + FIRST, texts))]
    for turn in turns:
        if turn.role == "user":
            told.append(Message("assistant", turn.text))
        else:
            told.append(Message("user", f"{turn.text}\n\n({NEXT})"))
    return told


def _assistant(turns: Sequence[Turn], template: str) -> list[Message]:
    told = [Message("system", fill(ASSISTANT, {"template": template}))]
    return told + [Message(turn.role, turn.text) for turn in turns]
