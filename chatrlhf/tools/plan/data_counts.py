"""Rows and tokens of each stage: counted where the data are here, else as somebody says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import Inputs, Rows, corpus, read_inputs
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference
from chatrlhf.data.templates import actor_template
from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.models.for_stages import encoder_class, tokenizer_and_settings

SAMPLED = 2000  # rows whose tokens are counted
EVALUATED = 16  # held-out rows that are assumed where the data are not here


# Of `Inputs`.
STAGES_AND_PARTS = (("PRETRAIN", "pretrain"), ("ACTOR", "actor"), ("REWARD", "reward"), ("RL", "prompts"))


@dataclass(frozen=True)
class Sides:
    """Tokens of what an encoder and a decoder read, where a model has both."""

    prompt: int  # of the longest
    reply: int  # of the longest
    mean_reply: float


@dataclass(frozen=True)
class Counted:
    """A stage's rows."""

    rows: int | None  # of an epoch; None: no one knows
    held_out: int
    longest: int  # tokens
    mean: float  # tokens, of what is within the context
    sides: Sides
    how: str  # where this is from


@dataclass
class Assumed:
    """What `--rows` and `--tokens` say, by stage."""

    rows: dict[str, int]
    tokens: dict[str, int]


def read_what_is_there(config: Config, stages: list[str], needs_judgements: bool) -> tuple[Inputs, dict[str, str]]:
    """Each stage's rows, and by stage why there are none.

    Raises:
        ConfigError, DataError: what is there is wrong.
    """
    found, missing = Inputs(), {}
    for stage, part in STAGES_AND_PARTS:
        if stage not in stages:
            continue
        try:
            read = read_inputs(config, [stage], needs_judgements)
        except MissingError as error:
            missing[stage] = str(error)
            continue
        setattr(found, part, getattr(read, part))
        found.notes += read.notes
        found.warnings += read.warnings
    return found, missing


def encoder_if_there(config: Config, limit: int) -> tuple[Encoder | None, str | None]:
    """The actor's, or why there is none."""
    try:
        tokenizer, settings = tokenizer_and_settings(config.actor_config, corpus(config))
        template = actor_template(config, tokenizer)
    except MissingError as error:
        return None, str(error)
    return encoder_class(settings).of(tokenizer, template, limit), None


def count(
    stage: str,
    rows: Rows | None,
    encoder: Encoder | None,
    limit: int,
    assumed: Assumed,
    holds_out: bool,
    config: Config,
) -> Counted:
    """A stage's rows; what is said goes before what is counted.

    Args:
        limit: tokens that a row may have.
        holds_out: whether some rows would be held out.
    """
    said, tokens = assumed.rows.get(stage), assumed.tokens.get(stage)
    held_out = EVALUATED if holds_out else 0
    if rows is None:
        how = "as --rows says" if said else f"not known; --rows {stage}=N says how many"
        mean = min(tokens or limit, limit)
        return Counted(said, held_out, limit, mean, Sides(limit - limit // 2, limit // 2, mean / 2), how)
    sides = [] if encoder is None else [_sides(row, encoder, config) for row in _some(rows.train)]
    kept = [min(sum(each), limit) for each in sides]
    longest = max(kept, default=limit)
    mean = tokens or (sum(kept) / len(kept) if kept else limit)
    prompts, replies = zip(*sides, strict=True) if sides else ((limit - limit // 2,), (limit // 2,))
    share = sum(replies) / (sum(prompts) + sum(replies))
    apart = Sides(min(max(prompts), limit), min(max(replies), limit), share * mean)
    how = "as --rows says" if said else "counted"
    return Counted(said or rows.epochs.size, len(rows.held_out), longest, mean, apart, how)


def parse_assumed(rows: list[str], tokens: list[str]) -> Assumed:
    """Of words such as ``ACTOR=1000``.

    Raises:
        ConfigError: a word is none.
    """
    return Assumed(_numbers(rows, "--rows"), _numbers(tokens, "--tokens"))


def _numbers(words: list[str], option: str) -> dict[str, int]:
    found = {}
    for word in words:
        stage, _, number = word.partition("=")
        if stage.upper() not in ("ACTOR", "REWARD", "RL") or not number.replace("_", "").isdigit() or int(number) < 1:
            raise ConfigError(f"{option} {word!r}: expected STAGE=N, such as ACTOR=1000")
        found[stage.upper()] = int(number)
    return found


def _some(rows: Any) -> list[Any]:
    step = max(1, len(rows) // SAMPLED)
    return [rows[i] for i in range(0, len(rows), step)][:SAMPLED]


def _sides(row: Any, encoder: Encoder, config: Config) -> tuple[int, int]:
    """Tokens of a row as its stage reads it; behind what is read as one there are none."""
    if isinstance(row, Prompt):
        return len(encoder.prompt(row)), 0
    if isinstance(row, (Demonstration, PlainText)):
        ids, labels = encoder.actor_row(row, config.actor_config.loss_on)
        return len(ids), encoder.row_length(ids, labels) - len(ids)
    replies = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
    prompt = len(encoder.prompt(row.prompt))
    return prompt, max(len(encoder.judged(row.prompt, each)) for each in replies) - prompt
