"""Everything a run reads, checked before any model is loaded: rows, held-out rows, prompts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from chatrlhf.config.load import resolve_path
from chatrlhf.config.schema import Config
from chatrlhf.conversation import Conversation
from chatrlhf.data import documents, stage_rows
from chatrlhf.data.documents import Documents, read_documents
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.mixture import MixtureEntry, mix
from chatrlhf.data.mixture_entries import mixture_entry
from chatrlhf.data.records import ADVISED_ROWS, StageRows, actor_rows, prompt_rows, read_stage, reward_rows
from chatrlhf.data.sources import LeftOut
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.runtime.file_hash import sha256_of

Row = TypeVar("Row")

FEWEST_TO_SPLIT = 10  # below, nothing is held out
MOST_HELD_OUT = {"actor": 500, "reward": 500, "prompts": 100}
CORPUS_ROWS = 20_000  # of each dataset of a mixture, for a tokenizer created on the fly
CORPUS_CHARACTERS = 20_000_000  # of each text of the PRETRAIN stage
MOST_IN_MEMORY = 200_000  # rows of a mixture; more are read when they are asked for


@dataclass
class Rows:
    """One stage's rows."""

    train: Sequence[Any]  # each once
    held_out: Sequence[Any]
    files: dict[str, str]  # path -> SHA-256, for the manifest
    epochs: Epochs  # which of the training rows each epoch sees


@dataclass
class Inputs:
    """What the stages of a run read; a stage that does not run has none."""

    pretrain: Documents | None = None
    actor: Rows | None = None
    reward: Rows | None = None
    prompts: Rows | None = None
    notes: list[str] = field(default_factory=list)  # what mixtures are made of
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reader:
    """How one stage's rows are read: from a file, or of the records of a mixture."""

    stage: str
    kind: str  # of rows, as in `ADVISED_ROWS`
    section: str
    train_key: str
    held_out_key: str
    rows_of: StageRows  # of a file
    draw: Callable[[Conversation], list[Any]]  # of a record of a mixture


ACTOR = Reader(
    "ACTOR",
    "actor",
    "actor_config",
    "train_dataset_path",
    "validation_dataset_path",
    actor_rows,
    stage_rows.demonstrations,
)
REWARD = Reader(
    "REWARD",
    "reward",
    "reward_config",
    "train_dataset_path",
    "validation_dataset_path",
    reward_rows,
    stage_rows.preferences,
)
PROMPTS = Reader(
    "RL", "prompts", "trainer_config", "examples_path", "validation_examples_path", prompt_rows, stage_rows.prompts
)


def read_inputs(config: Config, stages: Sequence[str], needs_judgements: bool) -> Inputs:
    """Read and check the files of all stages that will run.

    Args:
        stages: of PRETRAIN, ACTOR, REWARD, RL.
        needs_judgements: False where a reward function takes the reward model's place.

    Raises:
        ConfigError: a path is missing. DataError: with file, row and field.
    """
    inputs = Inputs()
    if "PRETRAIN" in stages:
        inputs.pretrain = read_documents(config, inputs.notes)
    if "ACTOR" in stages:
        inputs.actor = _rows(config, inputs, ACTOR)
    if "REWARD" in stages and needs_judgements:
        inputs.reward = _rows(config, inputs, REWARD)
        held_out = inputs.reward.held_out
        if held_out and type(held_out[0]) is not type(inputs.reward.train[0]):
            raise DataError("reward_config: training and validation file hold rows of different shapes; use one shape")
    if "RL" in stages:
        inputs.prompts = _rows(config, inputs, PROMPTS)
    return inputs


def corpus(config: Config) -> list[str]:
    """All text that the configuration's files hold; what a tokenizer created on the fly is trained on.

    It is the same whichever stages run, so that they all make the same tokenizer. Of each dataset of a mixture it is
    the beginning.
    """
    if "tiny" not in (config.actor_config.model, config.reward_config.model):
        return []  # no tokenizer is made, and a mixture may be long to read
    texts: list[str] = []
    for reader in (ACTOR, REWARD, PROMPTS):
        section = getattr(config, reader.section)
        value = getattr(section, reader.train_key)
        try:
            if value is not None:
                rows, _ = read_stage(resolve_path(config, "", value), reader.rows_of)
                texts += [text for row in rows for text in stage_rows.words(row)]
            for made, _ in _ingredients(config, reader, reader.draw):
                texts += [text for record in _first_records(made) for text in stage_rows.texts_of(record)]
        except (ConfigError, DataError):
            continue  # a file of a stage that does not run may be missing or unfinished
    with suppress(ConfigError, DataError):
        for made, _ in documents.entries(config, 0.0):
            plain = (text for record in _first_records(made) for text in stage_rows.texts_of(record))
            texts += beginning(plain, CORPUS_CHARACTERS)
    return texts


def beginning(texts: Iterable[str], most: int) -> Iterator[str]:
    """Texts up to a number of characters in all, the last of them cut."""
    for text in texts:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def _first_records(made: MixtureEntry) -> Iterator[Conversation]:
    """Those of a dataset's first rows."""
    for place in range(min(len(made.rows), CORPUS_ROWS)):
        yield from (each for each in made.convert(made.rows[place]) if not isinstance(each, LeftOut))


def split_by_group(rows: list[Row], groups: list[Hashable], fraction: float, most: int) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows; all rows of one group go to the same side.

    The choice depends on the rows alone, not on the run's seed: runs that differ in their seed are compared on
    the same held-out rows.
    """
    if fraction == 0 or len(rows) < FEWEST_TO_SPLIT:
        return rows, []
    sizes = Counter(groups)
    order = list(sizes)
    random.Random(0).shuffle(order)
    wanted = min(max(round(len(rows) * fraction), 1), most)
    chosen: set[Hashable] = set()
    count = 0
    for group in order:
        if count >= wanted or len(chosen) == len(order) - 1:
            break
        if count + sizes[group] <= wanted or not chosen:
            chosen.add(group)
            count += sizes[group]
    split = ([], [])
    for row, group in zip(rows, groups, strict=True):
        split[group in chosen].append(row)
    return split


def _rows(config: Config, inputs: Inputs, reader: Reader) -> Rows:
    section = getattr(config, reader.section)
    train_file, held_out_file = getattr(section, reader.train_key), getattr(section, reader.held_out_key)
    key = f"{reader.section}.{reader.train_key}"
    if section.datasets:
        rows = _mixed(config, inputs, reader)
    elif train_file is None:
        raise ConfigError(f"{key}: no file is named; give the path of a JSON or JSONL file")
    else:
        path = resolve_path(config, key, train_file)
        read, groups = _read(config, reader, path)
        fraction = 0.0 if held_out_file else section.validation_fraction
        train, held_out = split_by_group(read, groups, fraction, MOST_HELD_OUT[reader.kind])
        rows = Rows(train, held_out, {str(path): sha256_of(path)}, Epochs.of_all(len(train)))
        if len(read) < ADVISED_ROWS[reader.kind]:
            inputs.warnings.append(
                f"{path}: {len(read)} rows, fewer than the {ADVISED_ROWS[reader.kind]} that are advised for this stage"
            )
    if held_out_file is not None:
        path = resolve_path(config, f"{reader.section}.{reader.held_out_key}", held_out_file)
        held_out, _ = _read(config, reader, path)
        rows = replace(rows, held_out=held_out, files=rows.files | {str(path): sha256_of(path)})
    return rows


def _read(config: Config, reader: Reader, path: Path) -> tuple[list[Any], list[Hashable]]:
    """A file's rows and their groups; scored completions of one prompt as pairs, where the loss is one of pairs."""
    rows, groups = read_stage(path, reader.rows_of)
    wants_pairs = reader is REWARD and config.reward_config.loss == "pairwise"
    if not wants_pairs or not isinstance(rows[0], stage_rows.ScoredCompletion):
        return rows, groups
    pairs = stage_rows.paired(rows)
    if not pairs:
        raise ConfigError(
            f"reward_config.loss: 'pairwise' does not fit {path}, where no prompt has two completions with different "
            "scores; leave it out or set it to 'regression'"
        )
    return [pair for _, pair in pairs], [groups[place] for place, _ in pairs]


def _mixed(config: Config, inputs: Inputs, reader: Reader) -> Rows:
    section = getattr(config, reader.section)
    made = _ingredients(config, reader, _judgements(config, reader) if reader is REWARD else reader.draw)
    draws = _draws(config, reader)
    mixture = mix([each for each, _ in made], section.mixing_seed, section.deduplicate, draws)
    first, *rest = mixture.lines()
    inputs.notes += [f"{reader.stage}: {first}", *rest]
    files = {str(file): sha256_of(file) for _, files in made for file in files}
    if len(mixture.train) <= MOST_IN_MEMORY:
        return Rows(list(mixture.train), list(mixture.held_out), files, mixture.epochs)
    return Rows(mixture.train, mixture.held_out, files, mixture.epochs)


def _draws(config: Config, reader: Reader) -> Callable[[int], int]:
    """Of how many epochs the rows are drawn, given how many rows an epoch has: of all that the run will see."""
    section = getattr(config, reader.section)
    if not section.resample:
        return lambda rows: 1
    if reader is PROMPTS:
        return lambda rows: math.ceil(section.num_steps * section.num_rollouts / section.samples_per_prompt / rows)
    return lambda rows: section.epochs


def _ingredients(
    config: Config, reader: Reader, draw: Callable[[Conversation], list[Any]]
) -> list[tuple[MixtureEntry, list[Path]]]:
    section = getattr(config, reader.section)
    # A file of held-out rows takes the place of those that would be held out here.
    share = 0.0 if getattr(section, reader.held_out_key) else section.validation_fraction
    return [
        mixture_entry(entry, config, f"{reader.section}.datasets.{i}", draw, share, MOST_HELD_OUT[reader.kind])
        for i, entry in enumerate(section.datasets)
    ]


def _judgements(config: Config, reader: Reader) -> Callable[[Conversation], list[Any]]:
    """Scores or preferences: what `reward_config.loss` asks for, or else what the first judged record holds."""
    loss = config.reward_config.loss
    if loss is None:
        judged = (
            record
            for made, _ in _ingredients(config, reader, lambda record: [record])
            for place in range(len(made.rows))
            for record in made.convert(made.rows[place])
            if isinstance(record, Conversation) and stage_rows.is_judged(record)
        )
        first = next(judged, None)
        loss = "regression" if first is not None and first.scored else "pairwise"
    if loss == "pairwise":
        return stage_rows.preferences
    return lambda record: list(stage_rows.scored_completions(record)) if record.scored else []
