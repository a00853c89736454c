"""`generate_rewards.py`: scores where there are none, preferences by pairs, and new scored rows from a few."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable

from chatrlhf.conversation import Conversation
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import read_records
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.tools.synth import preferences, prompts, scores
from chatrlhf.tools.synth.client import BYTES_PER_TOKEN, LLMClient, most_tokens
from chatrlhf.tools.synth.instructions import read_templates
from chatrlhf.tools.synth.judge import Judge
from chatrlhf.tools.synth.llm import Request
from chatrlhf.tools.synth.options import is_local
from chatrlhf.tools.synth.output import Output
from chatrlhf.tools.synth.replies import Example, of_quality
from chatrlhf.tools.synth.row_makers import make_rows
from chatrlhf.tools.synth.session import Plan, Result, run
from chatrlhf.tools.synth.topics import TOPICS

NEXT_STEP = "next, in your configuration:\n  reward_config.train_dataset_path: {path}"
LEAST_SCORED = 3  # rows to show when new ones are made
WRITING_TEMPERATURE = 1.0  # of new prompts and replies; judgements have their own
VERDICT_TOKENS = 8  # of a judge's reply, for the estimate


def generate(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    low, high = options.scale
    if low >= high:
        raise ConfigError(f"--scale: {low:g} is not below {high:g}")
    if options.judgements > 1 and options.temperature == 0:
        raise ConfigError("--judgements: at --temperature 0 a judge says the same each time; raise it, or ask once")
    templates = read_templates(options.reward_template)
    bound = is_local(options) and not options.free
    judge = Judge(templates, (low, high), options.temperature, options.max_tokens, options.judgements, bound)
    records = list(read_records(options.dataset))
    ending = "pairs" if options.pairs else "scored"
    output = Output(options.output or options.dataset.with_name(f"{_stem(options)}_{ending}.json"))
    return (_prefer if options.pairs else _score)(options, output, judge, records)


def _score(options: argparse.Namespace, output: Output, judge: Judge, records: list[tuple[Row, Conversation]]) -> int:
    sheet = scores.load_scores(records)
    calibrated = scores.sample(sheet.human, options.calibrate, options.seed)
    requests = [each for slot in [*sheet.open, *calibrated] for each in judge.requests(slot.prompt, slot.completion)]
    examples = [Example(slot.prompt, slot.completion, slot.given) for slot in sheet.scored]
    if options.augment and len(examples) < LEAST_SCORED:
        raise DataError(
            f"{options.dataset}: --augment shows the model scored rows, of which there are {len(examples)}; give at "
            f"least {LEAST_SCORED}"
        )
    if not requests and not options.augment:
        raise DataError(
            f"{options.dataset}: nothing to do: {len(sheet.scored):,} completions have a score, none is without; "
            "--calibrate compares a judge with them, --augment makes more"
        )
    plan = _plan("completions", len(sheet.open) + len(calibrated), requests, options.augment, examples)

    async def work(client: LLMClient, done: Callable[[], None]) -> Result:
        filled = await scores.fill_in(sheet, judge, client, done)
        result = Result(sheet.rows, [filled], _lines(sheet))
        without = [why for said in filled.there for why in said.without]
        if without:
            result.lines.append(f"{len(without):,} further judgements hold no number (the first: {without[0]})")
        if options.judgements > 1 and filled.there:
            spread = sum(said.spread for said in filled.there) / len(filled.there)
            result.lines.append(f"single judgements deviate by {spread:.2f} from their row's mean")
        if options.calibrate and not calibrated:
            result.lines.append("nothing to calibrate with: no row carries a score that people gave")
        if calibrated:
            compared, made = await scores.calibrate(calibrated, judge, client, done)
            result.made.append(made)
            if compared is not None:
                result.lines.append(compared.line())
                result.about["calibration"] = compared.about()
        if options.augment:
            await _augment(options, judge, examples, client, result, done)
        return result

    return run(options, output, plan, work, NEXT_STEP)


def _lines(sheet: scores.Sheet) -> list[str]:
    lines = [f"{len(sheet.scored):,} completions had a score and keep it"] if sheet.scored else []
    if sheet.without:
        lines.append(f"left out {len(sheet.without):,} rows without a completion (the first: {sheet.without[0]})")
    if agreement := scores.agreement_line(sheet):
        lines.append(agreement)
    return lines


async def _augment(
    options: argparse.Namespace,
    judge: Judge,
    examples: list[Example],
    client: LLMClient,
    result: Result,
    done: Callable[[], None],
) -> None:
    """Add new rows to a result: prompts like the examples', replies of all qualities, scored by the judge."""
    shown = [example.prompt for example in examples]
    new, dropped = await prompts.more_prompts(
        client,
        judge.templates["rlhf"],
        shown,
        options.augment,
        TOPICS,
        options.seed,
        WRITING_TEMPERATURE,
        options.max_tokens,
    )
    low, high = judge.scale
    steps = [low + (high - low) * step / 5 for step in range(6)]
    rules = judge.templates["reward"].partition("{user_input}")[0].rpartition("\n\n")[0]
    makers = []
    for i, prompt in enumerate(new.there):
        wanted = random.Random(f"{options.seed}/quality/{i}").choice(steps)
        makers.append(
            of_quality(
                i, prompt, wanted, judge.scale, rules, examples, options.seed, WRITING_TEMPERATURE, options.max_tokens
            )
        )
    written = await make_rows(makers, client)
    judged = await scores.score_records(written.there, judge, client, done)
    result.rows += judged.there
    result.made += [new, written, judged]
    result.lines += [
        f"{len(judged.there):,} new rows behind the given ones",
        *prompts.shortage(options.augment, new, dropped),
    ]
    result.is_short = len(new.rows) < options.augment


def _prefer(options: argparse.Namespace, output: Output, judge: Judge, records: list[tuple[Row, Conversation]]) -> int:
    if options.augment:
        raise ConfigError("--augment makes scored rows; leave out --pairs")
    ballot = preferences.ballot_of(records)
    chance = random.Random(options.seed)
    compared = chance.sample(ballot.given, min(options.calibrate, len(ballot.given)))
    asked = [(each.prompt, each.pair.chosen, each.pair.rejected) for each in compared if each.pair]
    asked += [(prompt, first, second) for prompt, first, second, _ in ballot.open]
    if not asked:
        raise DataError(
            f"{options.dataset}: no prompt has two completions that are yet to be compared; give several rows with the "
            "same user_input, or --calibrate where people have compared them"
        )
    requests = [each for prompt, a, b in asked for each in judge.pair_requests(prompt.text, a, b)]
    plan = _plan("pairs", len(asked), requests)

    async def work(client: LLMClient, done: Callable[[], None]) -> Result:
        rows, made = await preferences.judge_pairs(ballot, judge, client, done)
        result = Result(rows, [made], [f"{len(ballot.given):,} pairs were given"] if ballot.given else [])
        if compared:
            line, calibration = await preferences.agreement(compared, judge, client, done)
            result.lines.append(line)
            result.made.append(calibration)
        return result

    return run(options, output, plan, work, NEXT_STEP)


def _plan(
    what: str, rows: int, requests: list[Request], augment: int = 0, examples: list[Example] | None = None
) -> Plan:
    tokens = sum(most_tokens(request)[0] for request in requests) // BYTES_PER_TOKEN
    length = sum(len(each.prompt) + len(each.completion) for each in examples or []) // max(len(examples or []), 1) // 4
    return Plan(
        what,
        rows + augment,
        len(requests) + 3 * augment,
        tokens + augment * 12 * length,
        VERDICT_TOKENS * len(requests) + augment * length,
    )


def _stem(options: argparse.Namespace) -> str:
    return options.dataset.name.split(".")[0]
