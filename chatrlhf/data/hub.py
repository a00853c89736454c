"""Rows of a public dataset: streamed from the hub, or from a copy of it on this machine."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any

from chatrlhf.data.file_errors import explained
from chatrlhf.data.files import holds_rows, open_rows, read_rows
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import Source
from chatrlhf.errors import DataError, UnreachableError

BUFFER_ROWS = 10_000  # rows read ahead from the hub, over all subsets, to draw from


def from_hub(source: Source, subset: str | None, split: str, seed: int) -> list[Iterator[Row]]:
    """The rows of each subset, in an order drawn by the seed. Raises DataError for a name that is not there."""
    _check_names(source, subset, split)
    subsets = (subset,) if subset else source.subsets or (None,)
    return [_stream(source, name, split, seed, max(BUFFER_ROWS // len(subsets), 1)) for name in subsets]


def _stream(source: Source, subset: str | None, split: str, seed: int, buffer: int) -> Iterator[Row]:
    """Rows of a subset, read from the hub as they are needed."""
    place = f"{source.hub_name}, {subset}/{split}" if subset else f"{source.hub_name}, {split}"
    with _explained(place):
        import datasets

        rows = datasets.load_dataset(source.hub_name, data_dir=subset, split=split, streaming=True)
        if source.gather is None:
            yield from (Row(row, place) for row in rows.shuffle(seed=seed, buffer_size=buffer))
        else:  # in their own order: one row alone is no record
            yield from source.gather(Row(row, place) for row in rows)


def _check_names(source: Source, subset: str | None, split: str) -> None:
    for value, known, option in ((subset, source.subsets, "subset"), (split, source.splits, "split")):
        if value is not None and value not in known:
            choice = f"choose one of {', '.join(known)}" if known else "it has none"
            raise DataError(f"--{option}: {source.hub_name} has no {value!r}; {choice}")


@contextmanager
def _explained(place: str) -> Iterator[None]:
    """What the hub's client raises, in one line."""
    try:
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its retries; what came of them is said below
        yield
    except DataError:
        raise
    except Exception as error:  # the errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnreachableError(
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
    with explained(copy):
        parts = _parts(source, copy, subset, split, notes)
    return [_shuffled(source, files, f"{seed}/{name}") for name, files in parts.items()]


def files_of(source: Source, copy: Path, subset: str | None, split: str, notes: list[str]) -> list[Path]:
    """The files of a copy, as `from_copy` would read them. Raises DataError."""
    with explained(copy):
        parts = _parts(source, copy, subset, split, notes)
    return [file for files in parts.values() for file in files]


def hub_rows(source: Source, subset: str | None, split: str, most: int | None) -> Sequence[Row]:
    """Rows of a dataset that the hub's client keeps on this machine.

    Args:
        most: of a dataset too large for that, this many of its first rows are read.

    Raises:
        DataError: the hub cannot be reached, the name of a subset or split is not there, or a dataset that is too
            large is asked for whole.
    """
    if source.is_huge:
        if most is None:
            raise DataError(f"{source.hub_name} is too large to be read whole; set size, or name a copy as source")
        return list(islice(chain.from_iterable(from_hub(source, subset, split, 0)), most))
    _check_names(source, subset, split)
    parts: list[Row] = []
    for name in (subset,) if subset else source.subsets or (None,):
        place = f"{source.hub_name}, {name}/{split}" if name else f"{source.hub_name}, {split}"
        with _explained(place):
            import datasets

            rows = datasets.load_dataset(source.hub_name, data_dir=name, split=split)
        parts.append(HubRows(rows, place))
    joined = parts[0] if len(parts) == 1 else Joined(parts)
    return joined if source.gather is None else list(source.gather(iter(joined)))


class HubRows(Sequence[Row]):
    """Rows that the hub's client has on disk."""

    def __init__(self, rows: Any, place: str) -> None:
        self.rows, self.place = rows, place

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return Row(self.rows[index], f"{self.place}, row {index + 1}")


class Joined(Sequence[Row]):
    """Rows of several files as one sequence."""

    def __init__(self, parts: Sequence[Sequence[Row]]) -> None:
        self.parts = parts
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect_right(self.ends, index)
        return self.parts[part][index - (self.ends[part - 1] if part else 0)]


def _parts(source: Source, copy: Path, subset: str | None, split: str, notes: list[str]) -> dict[str, list[Path]]:
    """The files of each subset; of a dataset without any, under the empty name."""
    if copy.is_file():
        return {"": [copy]}
    layout = "<subset>/<split>..." if source.subsets else "<split>..."
    if not copy.is_dir():
        raise DataError(f"--source {copy}: there is no such file or folder; name one with files {layout}")
    if not source.subsets:
        return {"": _files(source, copy, split, notes)}
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
    return {name: _files(source, copy / name, split, notes) for name in subsets}


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
