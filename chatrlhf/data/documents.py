"""Plain text for the PRETRAIN stage: documents that stay on the disk, and what is held out of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from chatrlhf.config.datasets import DatasetEntry
from chatrlhf.config.load import resolve_path
from chatrlhf.config.schema import Config
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.mixture import MixtureEntry, mix
from chatrlhf.data.mixture_entries import mixture_entry
from chatrlhf.data.stage_rows import PlainText, plain_texts
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.file_hash import sha256_of

SECTION = "pretrain_config"
MOST_HELD_OUT = 100  # documents
# Where an epoch sees a part of a dataset, the next ones see others: so many numbers of documents at most are drawn.
MOST_DRAWN, MOST_EPOCHS = 1_000_000, 1000


@dataclass
class Documents:
    """The texts of the stage, each read when it is asked for."""

    train: Sequence[PlainText]  # each once
    held_out: Sequence[PlainText]
    files: dict[str, str]  # path -> SHA-256, for the manifest
    epochs: Epochs  # which of the training documents each epoch sees

    def in_order(self) -> Iterator[PlainText]:
        """Those of the first epoch, then of the others, until all that was drawn has been seen once."""
        for epoch in self.epochs.rows:
            yield from (self.train[number] for number in epoch.tolist())


class Parts(Sequence[PlainText]):
    """One document without its end, or its end alone, read when it is asked for.

    Args:
        rows: the document.
        share: characters of it that are its end, cut behind a line where there is one.
    """

    def __init__(self, rows: Sequence[PlainText], share: float, is_end: bool) -> None:
        self.rows, self.share, self.is_end = rows, share, is_end

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> PlainText:
        row = self.rows[index]
        place = round(len(row.text) * (1 - self.share))
        place = row.text.rfind("\n", 0, place) + 1 or place
        return replace(row, text=row.text[place:]) if self.is_end else PlainText(row.text[:place], ends=False)


def read_documents(config: Config, notes: list[str]) -> Documents:
    """Check the stage's datasets, draw from them and hold out.

    Args:
        notes: what a mixture is made of is added to them.

    Raises:
        ConfigError: nothing is named, or it is not there. DataError: with file and row; a row that is no plain text.
    """
    section = config.pretrain_config
    share = 0.0 if section.validation_dataset_path else section.validation_fraction
    made = entries(config, share)
    if not made:
        raise ConfigError(f"{SECTION}.train_dataset_path: no file is named; give the path of a text or JSONL file")

    def draws(rows: int) -> int:
        return min(MOST_EPOCHS, max(MOST_DRAWN // rows, 1)) if section.resample else 1

    mixture = mix([each for each, _ in made], section.mixing_seed, section.deduplicate, draws)
    if section.datasets:
        first, *rest = mixture.lines()
        notes += [f"PRETRAIN: {first}", *rest]
    files = {str(file): sha256_of(file) for _, files in made for file in files}
    train, held_out = mixture.train, mixture.held_out
    if section.validation_dataset_path is not None:
        rows, path = _own(config, "validation_dataset_path", section.validation_dataset_path, 0.0)
        held_out, files = mix([rows], 0, deduplicate=False).train, files | {str(path): sha256_of(path)}
    elif share and len(train) == 1:
        train, held_out = (Parts(mixture.train, share, is_end) for is_end in (False, True))
    return Documents(train, held_out, files, mixture.epochs)


def entries(config: Config, held_out_share: float) -> list[tuple[MixtureEntry, list[Path]]]:
    """The stage's datasets, or its one file, and the files they are in; none where none is named."""
    section = config.pretrain_config
    if section.train_dataset_path is not None:
        made, path = _own(config, "train_dataset_path", section.train_dataset_path, held_out_share)
        return [(made, [path])]
    return [
        mixture_entry(entry, config, f"{SECTION}.datasets.{i}", plain_texts, held_out_share, MOST_HELD_OUT)
        for i, entry in enumerate(section.datasets)
    ]


def _own(config: Config, key: str, value: str, held_out_share: float) -> tuple[MixtureEntry, Path]:
    path = resolve_path(config, f"{SECTION}.{key}", value)
    entry = DatasetEntry(name=str(path.resolve()))
    made, _ = mixture_entry(entry, config, f"{SECTION}.{key}", plain_texts, held_out_share, MOST_HELD_OUT)
    return replace(made, name=value), path
