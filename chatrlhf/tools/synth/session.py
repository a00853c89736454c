"""One run of a generating script: what it will take, the asking, and what it leaves."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chatrlhf import __version__
from chatrlhf.errors.boundary import exit_status
from chatrlhf.errors.redaction import redacted, redacted_tree
from chatrlhf.runtime.publication import Publication
from chatrlhf.runtime.signals import listening
from chatrlhf.tools.synth.client import LLMClient
from chatrlhf.tools.synth.journal import Journal
from chatrlhf.tools.synth.llm import TextGenerator
from chatrlhf.tools.synth.options import is_local, limits_of, model_of, open_generator, price_of
from chatrlhf.tools.synth.output import Output
from chatrlhf.tools.synth.row_makers import Made

INCOMPLETE = 1
LICENCE = (
    "What a model writes stands under the terms of that model and of who runs it. OpenAI's forbid to develop models "
    "with it that compete with theirs; Meta's, and others', have conditions of their own. Read them before you train "
    "on this data or pass it on."
)
SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LOOKS = 10.0, 0.25


@dataclass(frozen=True)
class Plan:
    """What a command is about to do."""

    what: str  # of rows, in a few words
    rows: int
    requests: int
    prompt_tokens: int
    completion_tokens: int


@dataclass
class Result:
    """What came of it."""

    rows: list[dict[str, Any]]
    made: list[Made[Any]]
    lines: list[str] = field(default_factory=list)  # for people
    about: dict[str, Any] = field(default_factory=dict)  # for the metadata
    is_short: bool = False  # fewer rows than were wanted, and no more to be had

    @property
    def stopped(self) -> str | None:
        """By which limit."""
        return next((made.stopped for made in self.made if made.stopped), None)

    @property
    def unanswered(self) -> int:
        """Rows for which no one answered."""
        return sum(made.unanswered for made in self.made)


Work = Callable[[LLMClient, Callable[[], None]], Awaitable[Result]]


def run(options: argparse.Namespace, output: Output, plan: Plan, work: Work, next_step: str) -> int:
    """Say what will be asked, ask, write, and say what came of it.

    Args:
        work: does the asking; it calls its second argument after each row.
        next_step: what to do with the output, for people; ``{path}`` is its path.

    Returns:
        The exit status: 0, or 1 where rows are missing that another run could add.

    Raises:
        UserError: before anything is asked, or where nothing more can be.
    """
    with nullcontext() if options.dry_run else output.held() as publication:
        return _run(options, output, publication, plan, work, next_step)


def _run(
    options: argparse.Namespace,
    output: Output,
    publication: Publication | None,
    plan: Plan,
    work: Work,
    next_step: str,
) -> int:
    console = Console(highlight=False, soft_wrap=True)
    limits, price = limits_of(options), price_of(options)
    generator = None if is_local(options) else open_generator(options)
    model = str(model_of(options)) if generator is None else generator.model
    output.check(options.force, publication)
    for line in _estimate(options, plan, model):
        console.print(line, markup=False)
    if publication is None:  # a dry run
        return 0
    generator = generator or open_generator(options)  # a model on this machine takes its time
    console.print(f"note: {LICENCE}", markup=False, style="yellow")
    with Journal(output.journal) as journal:
        if journal.replies:
            console.print(f"{len(journal.replies):,} answers are there already ({output.journal})", markup=False)
        bar = _Bar(console, plan)
        client = LLMClient(generator, journal, limits, price, bar.tell)
        result = asyncio.run(_ask(generator, work, client, bar))
    complete = not result.stopped and not result.unanswered
    aside = [each for made in result.made for each in made.aside]
    output.write(publication, result.rows, aside, _about(options, model, complete, client, result))
    for line in _report(output, client, result, aside, complete):
        console.print(line, markup=False)
    console.print(next_step.replace("{path}", str(output.path)), markup=False)
    return 0 if complete and not result.is_short else INCOMPLETE


async def _ask(generator: TextGenerator, work: Work, client: LLMClient, bar: _Bar) -> Result:
    with bar:
        look = asyncio.create_task(bar.follow(client))
        try:
            return await work(client, bar.done)
        finally:
            look.cancel()
            with suppress(asyncio.CancelledError):
                await look
            bar.show(client)
            await generator.close()


class _Bar:
    """Rows, requests, tokens and cost: a bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, plan: Plan) -> None:
        self.console, self.total, self.count = console, plan.rows, 0
        self._last_line = time.monotonic()
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(plan.what, total=plan.rows, line="")

    def done(self) -> None:
        """A row is there, or put aside."""
        self.count += 1

    def tell(self, line: str) -> None:
        """A line about a wait."""
        self.console.print(redacted(line), markup=False)

    async def follow(self, client: LLMClient) -> None:
        """Keep what is shown up to date."""
        while True:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            self.show(client)

    def show(self, client: LLMClient) -> None:
        """What has been done so far."""
        line = _spent_line(client)
        self._progress.update(self._task, completed=self.count, total=max(self.total, self.count), line=line)
        if not self.console.is_terminal and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self.console.print(f"{self.count:,} of {max(self.total, self.count):,} rows, {line}", markup=False)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()


def _spent_line(client: LLMClient) -> str:
    spent = client.spent
    line = f"{spent.sent:,} requests, {spent.prompt_tokens + spent.completion_tokens:,.0f} tokens"
    return f"{line}, ${spent.cost:.4f}" if client.price else line


def _estimate(options: argparse.Namespace, plan: Plan, model: str) -> list[str]:
    tokens = f"about {plan.prompt_tokens:,} tokens in and {plan.completion_tokens:,} out"
    lines = [f"{plan.rows:,} {plan.what}, {plan.requests:,} requests to {model}: {tokens}"]
    if price := price_of(options):
        lines[0] += f", ${price.of(plan.prompt_tokens, plan.completion_tokens):.2f}"
    if options.max_requests is not None and options.max_requests < plan.requests:
        lines.append(f"--max-requests {options.max_requests} will stop it before the end")
    return lines


def _about(
    options: argparse.Namespace, model: str, complete: bool, client: LLMClient, result: Result
) -> dict[str, Any]:
    spent = client.spent
    shown = {name: str(value) if value is not None else None for name, value in vars(options).items()}
    return {
        "complete": complete,
        "model": model,
        "licence": LICENCE,
        "options": redacted_tree(shown),
        "made_by": f"chatrlhf {__version__}",
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "this_run": {
            "requests": spent.sent,
            "answers": spent.answered,
            "from_journal": spent.remembered,
            "prompt_tokens": round(spent.prompt_tokens),
            "completion_tokens": round(spent.completion_tokens),
            "cost_usd": round(spent.cost, 6) if client.price else None,
        },
        "unanswered": result.unanswered,
        "stopped": result.stopped,
        **result.about,
    }


def _report(
    output: Output, client: LLMClient, result: Result, aside: list[dict[str, Any]], complete: bool
) -> list[str]:
    lines = [*result.lines, f"wrote {output.path}: {len(result.rows):,} rows; {_spent_line(client)}"]
    if aside:
        lines.append(f"put aside {len(aside):,}, with the reasons: {output.quarantine}")
    if result.stopped:
        lines.append(f"stopped by {result.stopped}")
    if result.unanswered:
        lines.append(f"{result.unanswered:,} rows had no answer")
    if not complete:
        lines.append("run the same command again to add what is missing; nothing is asked twice")
    return lines


def guarded(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run a script's command; errors meant for people are one line."""
    with listening():
        return exit_status(
            lambda: command(options), "stopped; the same command continues from here, and asks nothing twice"
        )
