"""`generate_actor_dataset.py`: dialogues from a template and topics, or more like a user's own examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from chatrlhf.conversation import Conversation
from chatrlhf.data.records import actor_rows, read_records, to_json
from chatrlhf.data.stage_rows import Demonstration
from chatrlhf.errors import DataError
from chatrlhf.tools.synth import dialogues, prompts
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.instructions import read_templates
from chatrlhf.tools.synth.output import Output
from chatrlhf.tools.synth.replies import LEAST_EXAMPLES, SHOWN, Example, in_the_manner_of
from chatrlhf.tools.synth.row_makers import make_rows
from chatrlhf.tools.synth.session import Plan, Result, run
from chatrlhf.tools.synth.topics import read_topics

NEXT_STEP = "next, in your configuration:\n  actor_config.train_dataset_path: {path}"


def generate(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    templates, topics = read_templates(options.templates), read_topics(options.topics)
    output = Output(options.output_dir / "actor_training_data.json")
    if options.examples is None:
        return _from_scratch(options, output, templates["actor"], topics)
    return _from_examples(options, output, templates["rlhf"], topics)


def _from_scratch(options: argparse.Namespace, output: Output, template: str, topics: tuple[str, ...]) -> int:
    wanted = dialogues.plan_dialogues(options.num_conversations, topics, options.exchanges, options.seed)
    tokens = dialogues.tokens_of(wanted, template)
    plan = Plan("conversations", len(wanted), sum(each.requests for each in wanted), *tokens)

    async def work(client: LLMClient, done: Callable[[], None]) -> Result:
        makers = [
            dialogues.dialogue(i, each, template, options.temperature, options.max_tokens)
            for i, each in enumerate(wanted)
        ]
        made = await make_rows(makers, client, done)
        rows = [to_json(record) for record in made.there]
        repeats = len(rows) - len({str(row.get("turns", row["user_input"])) + row["completion"] for row in rows})
        lines = [f"{repeats:,} conversations repeat another; a higher --temperature or more --topics help"]
        return Result(rows, [made], lines if repeats else [])

    return run(options, output, plan, work, NEXT_STEP)


def _from_examples(options: argparse.Namespace, output: Output, template: str, topics: tuple[str, ...]) -> int:
    records, examples = read_examples(options.examples)
    shown = [example.prompt for example in examples]
    number = options.num_conversations
    asked, said = prompts.tokens_of(number, template, shown)
    length = sum(len(each.prompt) + len(each.completion) for each in examples) // len(examples) // 4
    plan = Plan("conversations", number, 2 * number, asked + number * (SHOWN + 1) * length, said + number * length)

    async def work(client: LLMClient, done: Callable[[], None]) -> Result:
        new, dropped = await prompts.more_prompts(
            client, template, shown, number, topics, options.seed, options.temperature, options.max_tokens
        )
        makers = [
            in_the_manner_of(i, prompt, examples, options.seed, options.temperature, options.max_tokens)
            for i, prompt in enumerate(new.there)
        ]
        made = await make_rows(makers, client, done)
        rows = [to_json(record) for record in [*records, *made.there]]
        lines = [f"{len(records):,} rows of {options.examples}, {len(made.there):,} new ones behind them"]
        lines += prompts.shortage(number, new, dropped)
        return Result(rows, [new, made], lines, is_short=len(new.rows) < number)

    return run(options, output, plan, work, NEXT_STEP)


def read_examples(path: Path) -> tuple[list[Conversation], list[Example]]:
    """A user's own records, and the demonstrations in them. Raises DataError where there are too few of these."""
    records, examples = [], []
    for row, record in read_records(path):
        records.append(record)
        examples += [
            Example(each.prompt.text, each.completion)
            for each in actor_rows(row, record)
            if isinstance(each, Demonstration)
        ]
    if len(examples) < LEAST_EXAMPLES:
        raise DataError(
            f"{path}: {len(examples)} examples are too few to write more like them; give at least {LEAST_EXAMPLES} "
            "rows with user_input and completion"
        )
    return records, examples
