"""From an entry of `datasets:` to a dataset that can be mixed: a public one, or a file of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from chatrlhf.config.datasets import DatasetEntry
from chatrlhf.config.load import resolve_path
from chatrlhf.config.schema import Config
from chatrlhf.conversation import Conversation
from chatrlhf.data.files import open_rows
from chatrlhf.data.hub import Joined, files_of, hub_rows
from chatrlhf.data.json_row import Row, names_of
from chatrlhf.data.mixture import MixtureEntry
from chatrlhf.data.records import from_json
from chatrlhf.data.sources import Source
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.errors import ConfigError, DataError, MissingError

# As other projects' files spell them.
ALSO_KNOWN_AS = {
    "HH_RLHF": "ARLHF",
    "ANTHROPIC_RLHF": "ARLHF",
    "OASST": "OASST1",
    "OASST_EXPORT": "OASST1",
    "REDPAJAMA": "RED_PAJAMA",
    "THE_PILE": "PILE",
}
Draw = Callable[[Conversation], list[Any]]


def mixture_entry(
    entry: DatasetEntry, config: Config, key: str, draw: Draw, held_out_share: float, held_out_most: int
) -> tuple[MixtureEntry, list[Path]]:
    """A dataset of a mixture, and the files it is in.

    Args:
        key: where the entry stands, for messages.
        draw: what the stage has of a record.
        held_out_share, held_out_most: where the entry says nothing.

    Raises:
        ConfigError: the name is neither a known dataset's nor a file's, or an option does not go with it.
        DataError: it cannot be read.
    """
    name = entry.name.upper().replace("-", "_")
    source = SOURCES.get(ALSO_KNOWN_AS.get(name, name))
    rows, files = _public(entry, source, config, key) if source else _own(entry, config, key)
    made = MixtureEntry(
        name=entry.name,
        rows=rows,
        convert=partial(source.records, lang=entry.lang) if source else _from_columns(entry.columns),
        draw=draw,
        held_out_share=held_out_share if entry.val_split is None else entry.val_split,
        held_out_most=held_out_most if entry.max_val_set is None else entry.max_val_set,
        fraction=entry.fraction,
        size=entry.size,
        weight=entry.weight,
        max_chunk_size=entry.max_chunk_size,
        drop_narrative=entry.drop_narrative,
        loss_on=entry.loss_on or (source.loss_on if source else None),
        key=source.key if source else None,
        most_per_prompt=source.pairs_per_prompt if source else None,
    )
    return made, files


def _public(entry: DatasetEntry, source: Source, config: Config, key: str) -> tuple[Sequence[Row], list[Path]]:
    if entry.columns:
        raise ConfigError(f"{key}.columns: {entry.name} has columns of its own; leave it out")
    if entry.lang and source.language is None:
        raise ConfigError(f"{key}.lang: the rows of {entry.name} do not say which language they are in; leave it out")
    if entry.source is None:
        return hub_rows(source, entry.subset, entry.split, entry.size), []
    copy = resolve_path(config, f"{key}.source", entry.source)
    files = files_of(source, copy, entry.subset, entry.split, [])
    if source.gather is None:
        return Joined([open_rows(file) for file in files]), files
    return list(source.gather(row for file in files for row in open_rows(file))), files


def _own(entry: DatasetEntry, config: Config, key: str) -> tuple[Sequence[Row], list[Path]]:
    for option in ("source", "subset", "lang"):
        if getattr(entry, option) is not None:
            raise ConfigError(
                f"{key}.{option}: it goes with a public dataset, and {entry.name!r} is none; leave it out"
            )
    try:
        path = resolve_path(config, f"{key}.name", entry.name)
    except MissingError as error:
        known = ", ".join(name.lower() for name in SOURCES)
        raise MissingError(f"{error}; or name one of {known}") from None
    return open_rows(path), [path]


def _from_columns(columns: dict[str, str]) -> Callable[[Row], list[Conversation]]:
    """Rows of a file whose columns have names of their own; what is not named keeps its name."""

    def convert(row: Row) -> list[Conversation]:
        for column in columns.values():
            if column not in row.values:
                found = names_of(row.values)
                raise DataError(f"{row.place}: there is no column {column!r} (found {found}); correct columns")
        named = {field: row.values[column] for field, column in columns.items()}
        rest = {name: value for name, value in row.values.items() if name not in columns.values()}
        return [from_json(replace(row, values=rest | named))]

    return convert
