"""More prompts from a few, none of them nearly another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from chatrlhf.tools.synth.clean_reply import message
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.llm import Message, Request
from chatrlhf.tools.synth.rouge import Texts
from chatrlhf.tools.synth.row_makers import Made, RowMaker, collect
from chatrlhf.tools.synth.topics import MANNERS

SHOWN = 4  # examples in a request
LONGEST_SHOWN = 1500  # characters of an example


async def more_prompts(
    client: LLMClient,
    template: str,
    examples: Sequence[str],
    wanted: int,
    topics: Sequence[str],
    seed: int,
    temperature: float,
    max_tokens: int,
    done: Callable[[], None] = lambda: None,
) -> tuple[Made[str], int]:
    """Prompts that are near-duplicates neither of the examples nor of each other.

    Args:
        template: what is asked for; a few of the examples, drawn by the seed, stand behind it.
        examples: where there are none, each request names a topic instead.
        topics: to draw from where there are no examples.

    Returns:
        The prompts, and how many near-duplicates were dropped.
    """
    known = Texts()
    for example in examples:
        known.take(example)

    def maker(number: int) -> RowMaker[str]:
        told = _told(template, examples, topics, random.Random(f"{seed}/{number}"))
        request = Request((Message("user", told),), temperature, max_tokens, nth=number)

        async def make(client: LLMClient) -> str:
            return message(await client.ask(request), "the new request")

        return make

    return await collect(wanted, maker, known.take, client, done)


def tokens_of(wanted: int, template: str, examples: Sequence[str]) -> tuple[int, int]:
    """Prompt and completion tokens that so many prompts will take, roughly."""
    mean = sum(min(len(example), LONGEST_SHOWN) for example in examples) / max(len(examples), 1) / 4
    return int(wanted * (len(template) / 4 + SHOWN * (mean + 8))), int(wanted * (mean or 40))


def shortage(wanted: int, made: Made[str], dropped: int) -> list[str]:
    """What to say about near-duplicates, and about prompts that are missing because of them."""
    lines = [f"left out {dropped:,} near-duplicates"] if dropped else []
    if len(made.rows) < wanted and made.is_complete:
        lines.append(
            f"{len(made.rows):,} of {wanted:,} prompts: the model repeats itself; a higher --temperature, more "
            "examples or another model help"
        )
    return lines


def _told(template: str, examples: Sequence[str], topics: Sequence[str], chance: random.Random) -> str:
    if not examples:
        return (
            f"{template}\n\nThe subject is: {chance.choice(topics)}. The person {chance.choice(MANNERS)}.\n\nRequest:"
        )
    shown = chance.sample(range(len(examples)), min(SHOWN, len(examples)))
    parts = [f"Request {i}:\n{examples[at][:LONGEST_SHOWN]}" for i, at in enumerate(shown, start=1)]
    return "\n\n".join([template, *parts, f"Request {len(parts) + 1}:"])
