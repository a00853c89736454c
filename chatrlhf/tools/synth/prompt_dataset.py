"""`extend_rlhf_dataset.py`: more prompts from a few."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from chatrlhf.conversation import Conversation, Prompt
from chatrlhf.data.records import read_prompts, to_json
from chatrlhf.tools.synth import prompts
from chatrlhf.tools.synth.clean_reply import written_by
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.instructions import read_templates
from chatrlhf.tools.synth.output import Output
from chatrlhf.tools.synth.session import Plan, Result, run
from chatrlhf.tools.synth.topics import read_topics

FILES = ("rlhf_training_data.json", "actor_training_data.json")  # looked for in this order
NEXT_STEP = "next, in your configuration:\n  trainer_config.examples_path: {path}"


def extend(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    template, topics = read_templates(options.templates)["rlhf"], read_topics(options.topics)
    source, path = options.examples or _few(options.data_dir), options.output or default_output(options.data_dir)
    given = list(dict.fromkeys(read_prompts(source))) if source is not None else []
    shown = [prompt.text for prompt in given]
    number = options.num_prompts
    plan = Plan("prompts", number, number, *prompts.tokens_of(number, template, shown))

    async def work(client: LLMClient, done: Callable[[], None]) -> Result:
        made, dropped = await prompts.more_prompts(
            client, template, shown, number, topics, options.seed, options.temperature, options.max_tokens, done
        )
        new = [Conversation(Prompt.of(text), provenance=written_by(client.generator.model)) for text in made.there]
        rows = [to_json(record) for record in [*(Conversation(prompt) for prompt in given), *new]]
        lines = [f"{len(given):,} prompts of {source}, {len(new):,} new ones behind them"] if given else []
        lines += prompts.shortage(number, made, dropped)
        return Result(rows, [made], lines, {"prompts_given": len(given)}, is_short=len(new) < number)

    return run(options, Output(path), plan, work, NEXT_STEP)


def default_output(folder: Path) -> Path:
    """The file of prompts where there is none, or one that this command has begun; or else one beside it."""
    path = folder / FILES[0]
    return path if not path.exists() or _is_ours(path) else path.with_name("rlhf_training_data_extended.json")


def _few(folder: Path) -> Path | None:
    """The file whose prompts are to become more."""
    return next((path for name in FILES if (path := folder / name).exists() and not _is_ours(path)), None)


def _is_ours(path: Path) -> bool:
    return path.name == FILES[0] and Output(path).meta.exists()
