"""Everything a run reads, checked before any model is loaded: rows, held-out rows, prompts."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from chatrlhf.config.load import resolve_path
from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.records import (
    ADVISED_ROWS,
    read_demonstrations,
    read_judgements,
    read_prompts,
)
from chatrlhf.data.views import PlainText, words
from chatrlhf.errors import ConfigError, DataError

Row = TypeVar("Row")

FEWEST_TO_SPLIT = 10  # below, nothing is held out
MOST_HELD_OUT = {"actor": 500, "reward": 500, "prompts": 100}


@dataclass
class Rows:
    """One stage's rows."""

    train: list[Any]
    held_out: list[Any]
    files: dict[str, str]  # path -> SHA-256, for the manifest


@dataclass
class Inputs:
    """What the stages of a run read; a stage that does not run has none."""

    actor: Rows | None = None
    reward: Rows | None = None
    prompts: Rows | None = None
    warnings: list[str] = field(default_factory=list)


def read_inputs(config: Config, stages: Sequence[str], needs_judgements: bool) -> Inputs:
    """Read and check the files of all stages that will run.

    Args:
        stages: of ACTOR, REWARD, RL.
        needs_judgements: False where a reward function takes the reward model's place.

    Raises:
        ConfigError: a path is missing. DataError: with file, row and field.
    """
    inputs = Inputs()
    actor, reward, trainer = config.actor_config, config.reward_config, config.trainer_config
    if "ACTOR" in stages:
        key = "actor_config.train_dataset_path"
        files = (key, actor.train_dataset_path, actor.validation_dataset_path)
        inputs.actor = _rows(config, inputs, "actor", files, actor.validation_fraction, read_demonstrations)
    if "REWARD" in stages and needs_judgements:
        key = "reward_config.train_dataset_path"
        files = (key, reward.train_dataset_path, reward.validation_dataset_path)
        inputs.reward = _rows(config, inputs, "reward", files, reward.validation_fraction, read_judgements)
        held_out = inputs.reward.held_out
        if held_out and type(held_out[0]) is not type(inputs.reward.train[0]):
            raise DataError("reward_config: training and validation file hold rows of different shapes; use one shape")
    if "RL" in stages:
        files = ("trainer_config.examples_path", trainer.examples_path, trainer.validation_examples_path)
        inputs.prompts = _rows(config, inputs, "prompts", files, trainer.validation_fraction, read_prompts)
    return inputs


def corpus(config: Config) -> list[str]:
    """All text that the configuration's files hold; what a tokenizer made on the spot is trained on.

    It is the same whichever stages run, so that they all make the same tokenizer.
    """
    texts: list[str] = []
    readers: list[tuple[str | None, Callable[[Path], list[Any]]]] = [
        (config.actor_config.train_dataset_path, read_demonstrations),
        (config.reward_config.train_dataset_path, read_judgements),
        (config.trainer_config.examples_path, read_prompts),
    ]
    for value, read in readers:
        if value is None:
            continue
        try:
            rows = read(resolve_path(config, "", value))
        except (ConfigError, DataError):
            continue  # a file of a stage that does not run may be missing or unfinished
        for row in rows:
            texts += words(row)
    return texts


def split_by_prompt(rows: list[Row], fraction: float, most: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows; all rows of one prompt go to the same side.

    The choice depends on the rows alone, not on the run's seed: runs that differ in their seed are compared on
    the same held-out rows.
    """
    if fraction == 0 or len(rows) < FEWEST_TO_SPLIT:
        return rows, []
    prompts = list(dict.fromkeys(_prompt(row) for row in rows))
    random.Random(0).shuffle(prompts)
    wanted = min(max(round(len(rows) * fraction), 1), most)
    by_prompt: dict[Prompt | str, int] = {}
    for row in rows:
        by_prompt[_prompt(row)] = by_prompt.get(_prompt(row), 0) + 1
    chosen: set[Prompt | str] = set()
    count = 0
    for prompt in prompts:
        if count >= wanted or len(chosen) == len(prompts) - 1:
            break
        if count + by_prompt[prompt] <= max(wanted, 1) or not chosen:
            chosen.add(prompt)
            count += by_prompt[prompt]
    return [row for row in rows if _prompt(row) not in chosen], [row for row in rows if _prompt(row) in chosen]


def _rows(
    config: Config,
    inputs: Inputs,
    kind: str,
    files: tuple[str, str | None, str | None],
    fraction: float,
    read: Callable[[Path], list[Any]],
) -> Rows:
    key, train_file, held_out_file = files
    if train_file is None:
        raise ConfigError(f"{key}: no file is named; give the path of a JSON or JSONL file")
    path = resolve_path(config, key, train_file)
    rows = read(path)
    hashes = {str(path): _hash(path)}
    if len(rows) < ADVISED_ROWS[kind]:
        inputs.warnings.append(
            f"{path}: {len(rows)} rows, fewer than the {ADVISED_ROWS[kind]} that are advised for this stage"
        )
    if held_out_file is None:
        return Rows(*split_by_prompt(rows, fraction, MOST_HELD_OUT[kind]), hashes)
    held_out_key = key.replace("train_dataset", "validation_dataset").replace(".examples", ".validation_examples")
    held_out_path = resolve_path(config, held_out_key, held_out_file)
    return Rows(rows, read(held_out_path), hashes | {str(held_out_path): _hash(held_out_path)})


def _prompt(row: Any) -> Prompt | str:
    """What rows have to share to stand on one side: of plain text only the text itself."""
    if isinstance(row, Prompt):
        return row
    return row.text if isinstance(row, PlainText) else row.prompt


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
