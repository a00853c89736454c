"""Rows of a public dataset: streamed from the hub, or from a copy of it on this machine."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from chatrlhf.data.files import holds_rows, open_rows, read_rows
from chatrlhf.data.row import Row
from chatrlhf.data.sources import Source
from chatrlhf.errors import DataError

BUFFER_ROWS = 10_000  # rows read ahead from the hub, over all subsets, to draw from


def from_hub(source: Source, subset: str | None, split: str, seed: int) -> list[Iterator[Row]]:
    """The rows of each subset, in an order drawn by the seed. Raises DataError for a name that is not there."""
    for value, known, option in ((subset, source.subsets, "subset"), (split, source.splits, "split")):
        if value is not None and value not in known:
            choice = f"choose one of {', '.join(known)}" if known else "it has none"
            raise DataError(f"--{option}: {source.hub_name} has no {value!r}; {choice}")
    subsets = (subset,) if subset else source.subsets or (None,)
    return [_stream(source, name, split, seed, max(BUFFER_ROWS // len(subsets), 1)) for name in subsets]


def _stream(source: Source, subset: str | None, split: str, seed: int, buffer: int) -> Iterator[Row]:
    """Rows of a subset, read from the hub as they are needed."""
    place = f"{source.hub_name}, {subset}/{split}" if subset else f"{source.hub_name}, {split}"
    try:
        import datasets
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its retries; what came of them is said below
        rows = datasets.load_dataset(source.hub_name, data_dir=subset, split=split, streaming=True)
        if source.gather is None:
            yield from (Row(row, place) for row in rows.shuffle(seed=seed, buffer_size=buffer))
        else:  # in their own order: one row alone is no record
            yield from source.gather(Row(row, place) for row in rows)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises the errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{place}: it could not be read from the hub ({reason}); check the connection, or copy the "
            "dataset to this machine and name its folder with --source"
        ) from error


def from_copy(
    source: Source, copy: Path, subset: str | None, split: str, seed: int, notes: list[str]
) -> list[Iterator[Row]]:
    """The rows of each subset in a folder in the hub's layout, or of one file, in an order drawn by the seed.

    Args:
        split: where the copy lacks it, what is there is taken.
        notes: what was passed over or taken instead is added to them.

    Raises:
        DataError: there is nothing to read.
    """
    if copy.is_file():
        return [_shuffled(source, [copy], f"{seed}/")]
    layout = "<subset>/<split>..." if source.subsets else "<split>..."
    if not copy.is_dir():
        raise DataError(f"--source {copy}: there is no such file or folder; name one with files {layout}")
    if not source.subsets:
        return [_shuffled(source, _files(source, copy, split, notes), f"{seed}/")]
    present = {folder.name for folder in copy.iterdir() if folder.is_dir() and any(map(holds_rows, folder.iterdir()))}
    if subset is not None and subset not in present:
        found = ", ".join(sorted(present)) or "none"
        raise DataError(f"--subset {subset}: {copy} has no such subset with files {layout} (found {found})")
    subsets = [subset] if subset else [name for name in source.subsets if name in present]
    if not subsets:
        known = ", ".join(source.subsets)
        raise DataError(f"--source {copy}: there are no files {layout} in it; known subsets are {known}")
    if unknown := present - set(source.subsets) - set(subsets):
        notes.append(f"passed over, because the rows may have another form: {', '.join(sorted(unknown))}")
    return [_shuffled(source, _files(source, copy / name, split, notes), f"{seed}/{name}") for name in subsets]


def _files(source: Source, folder: Path, split: str, notes: list[str]) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if holds_rows(file))
    of_split = [file for file in files if split in (_stem(file), file.parent.name)]
    if of_split:
        return of_split
    if not files:
        raise DataError(f"--source {folder}: there are no files of rows in it; copy the dataset again")
    named = [file for file in files if {_stem(file), file.parent.name} & set(source.splits)] or files
    notes.append(f"{folder} has no split {split!r}; took {', '.join(file.name for file in named)}")
    return named


def _stem(file: Path) -> str:
    """A file's split: ``train`` of train.jsonl.gz and of train-00000-of-00002.parquet."""
    return file.name.split(".")[0].split("-")[0]


def _shuffled(source: Source, files: list[Path], seed: str) -> Iterator[Row]:
    if source.gather is not None:
        rows = list(source.gather(row for file in files for row in read_rows(file)))
        random.Random(seed).shuffle(rows)
        yield from rows
        return
    parts = [open_rows(file) for file in files]
    places = [(part, index) for part in parts for index in range(len(part))]
    random.Random(seed).shuffle(places)
    for part, index in places:
        yield part[index]
