"""A public preference dataset to ChatLLaMA's three files, read from the hub or from a local copy of it.

    actor_training_data.json    {"user_input", "completion"}            the preferred reply
    reward_training_data.json   {"user_input", "chosen", "rejected"}    both replies
    rlhf_training_data.json     {"user_input"}

All three come from the same sampled pairs, as with ChatLLaMA. Where a prompt has several pairs (SHP), the
actor's file and the prompts hold what repeats only once.
"""

from __future__ import annotations

import gzip
import json
import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chatrlhf.data.records import Preference
from chatrlhf.data.sources import Row, Source, hh_rlhf, shp
from chatrlhf.errors import DataError

SOURCES: dict[str, Source] = {"ARLHF": hh_rlhf.SOURCE, "SHP": shp.SOURCE}
ACTOR, REWARD, PROMPTS = "actor_training_data.json", "reward_training_data.json", "rlhf_training_data.json"
BUFFER_ROWS = 10_000  # rows read ahead from the hub, over all subsets, to draw from

Place = tuple[str, Row]  # where a row stands, for messages, and the row


@dataclass(frozen=True)
class Download:
    """What was written, what was left out and why."""

    source: Source
    rows: dict[Path, int]
    asked: int
    left_out: Counter[str]
    notes: list[str]

    def lines(self) -> list[str]:
        """A report for people, and what to do next."""
        actor, reward, prompts = self.rows
        lines = [*self.notes, *(f"wrote {path}: {count:,} rows" for path, count in self.rows.items())]
        if self.rows[reward] < self.asked:
            lines.append(f"asked for {self.asked:,} pairs, {self.rows[reward]:,} were there")
        lines += [f"left out {count:,}: {reason}" for reason, count in sorted(self.left_out.items())]
        return [
            *lines,
            "next, in your configuration:",
            f"  actor_config.template: {self.source.template}",
            f"  actor_config.train_dataset_path: {actor}",
            f"  reward_config.train_dataset_path: {reward}",
            f"  trainer_config.examples_path: {prompts}",
        ]


def download(
    name: str,
    path: Path,
    number_of_samples: int = 200,
    *,
    source_dir: Path | None = None,
    subset: str | None = None,
    split: str = "train",
    seed: int = 0,
    force: bool = False,
) -> Download:
    """Draw pairs, from the subsets in turn and at random within each, and write the three files.

    Args:
        name: a key of `SOURCES`.
        path: folder of the three files.
        number_of_samples: pairs to write; fewer where there are fewer.
        source_dir: a local copy in the hub's layout, read instead of the hub.
        subset: null: all of them.
        split: where a local copy lacks it, what is there is taken.
        seed: the same seed draws the same rows (from the hub not the same as from a local copy).
        force: overwrite files that are there.

    Raises:
        DataError: files would be overwritten, nothing usable was found, a row is not of this dataset, the hub
            cannot be reached, or the folder cannot be written.
    """
    source = SOURCES[name]
    if number_of_samples < 1:
        raise DataError(f"number_of_samples: {number_of_samples} is too few; ask for at least 1")
    files = [path.expanduser() / file for file in (ACTOR, REWARD, PROMPTS)]
    existing = [str(file) for file in files if file.exists()]
    if existing and not force:
        raise DataError(f"refused to overwrite {', '.join(existing)}; give another --path, or --force")
    notes: list[str] = []
    if source_dir is None:
        streams = _from_hub(source, subset, split, seed)
    else:
        streams = _from_folder(source, source_dir.expanduser(), subset, split, seed, notes)
    pairs, left_out = _draw(source, _in_turn(streams), number_of_samples)
    if not pairs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "there are no rows"
        raise DataError(f"{source_dir or source.hub_name}: no usable pair was found ({reasons}); choose another subset")
    rows = {
        files[0]: _once({"user_input": pair.prompt, "completion": pair.chosen} for pair in pairs),
        files[1]: [{"user_input": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs],
        files[2]: _once({"user_input": pair.prompt} for pair in pairs),
    }
    _write(rows)
    return Download(source, {file: len(r) for file, r in rows.items()}, number_of_samples, left_out, notes)


def _draw(source: Source, rows: Iterable[Place], wanted: int) -> tuple[list[Preference], Counter[str]]:
    pairs: list[Preference] = []
    left_out: Counter[str] = Counter()
    of_prompt: Counter[str] = Counter()
    for place, row in rows:
        pair = source.convert(row, place)
        reason = pair if isinstance(pair, str) else _unusable(pair)
        if reason is None and of_prompt[pair.prompt] >= source.pairs_per_prompt:
            reason = f"more than {source.pairs_per_prompt} of one prompt"
        if reason is not None:
            left_out[reason] += 1
            continue
        of_prompt[pair.prompt] += 1
        pairs.append(pair)
        if len(pairs) == wanted:
            break
    return pairs, left_out


def _unusable(pair: Preference) -> str | None:
    """Why a pair cannot be trained on, whatever the dataset."""
    if not pair.prompt.strip():
        return "empty prompts"
    if pair.chosen == pair.rejected:
        return "replies that are the same"
    try:
        "".join((pair.prompt, pair.chosen, pair.rejected)).encode()
    except UnicodeEncodeError:
        return "texts with half a character (a lone surrogate)"
    return None


def _in_turn(streams: list[Iterator[Place]]) -> Iterator[Place]:
    """One row of each stream, again and again, until all are used up."""
    while streams:
        going = []
        for stream in streams:
            if (item := next(stream, None)) is not None:
                going.append(stream)
                yield item
        streams = going


def _from_hub(source: Source, subset: str | None, split: str, seed: int) -> list[Iterator[Place]]:
    for value, known, option in ((subset, source.subsets, "subset"), (split, source.splits, "split")):
        if value is not None and value not in known:
            raise DataError(f"--{option}: {source.hub_name} has no {value!r}; choose one of {', '.join(known)}")
    subsets = (subset,) if subset else source.subsets
    return [_stream(source, name, split, seed, max(BUFFER_ROWS // len(subsets), 1)) for name in subsets]


def _stream(source: Source, subset: str, split: str, seed: int, buffer: int) -> Iterator[Place]:
    """Rows of a subset, read from the hub as they are needed."""
    place = f"{source.hub_name}, {subset}/{split}"
    try:
        import datasets
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # its retries; what came of them is said below
        rows = datasets.load_dataset(source.hub_name, data_dir=subset, split=split, streaming=True)
        for row in rows.shuffle(seed=seed, buffer_size=buffer):
            yield place, row
    except Exception as error:  # the hub's client raises the errors of several libraries
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{place}: it could not be read from the hub ({reason}); check the connection, or copy the "
            "dataset to this machine and name its folder with --source"
        ) from error


def _from_folder(
    source: Source, folder: Path, subset: str | None, split: str, seed: int, notes: list[str]
) -> list[Iterator[Place]]:
    layout = f"<subset>/<split>{source.suffix}"
    if not folder.is_dir():
        raise DataError(f"--source {folder}: there is no such folder; name one with files {layout}")
    present = {file.parent.name for split_ in source.splits for file in folder.glob(f"*/{split_}{source.suffix}")}
    if subset is not None and subset not in present:
        found = ", ".join(sorted(present)) or "none"
        raise DataError(f"--subset {subset}: {folder} has no such subset with files {layout} (found {found})")
    subsets = [subset] if subset else [name for name in source.subsets if name in present]
    if not subsets:
        known = ", ".join(source.subsets)
        raise DataError(f"--source {folder}: there are no files {layout} in it; known subsets are {known}")
    if unknown := present - set(source.subsets) - set(subsets):
        notes.append(f"passed over, because the rows may have another form: {', '.join(sorted(unknown))}")
    streams = []
    for name in subsets:
        files = [folder / name / f"{split}{source.suffix}"]
        if not files[0].exists():
            files = [file for s in source.splits if (file := folder / name / f"{s}{source.suffix}").exists()]
            took = ", ".join(file.name for file in files)
            notes.append(f"{folder / name} has no {split}{source.suffix}; took {took}")
        rows = [row for file in files for row in _read(file)]
        random.Random(f"{seed}/{name}").shuffle(rows)
        streams.append(iter(rows))
    return streams


def _read(file: Path) -> list[Place]:
    rows: list[Place] = []
    try:
        with _open(file) as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                place = f"{file}, row {number}"
                rows.append((place, _parse(line, place)))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: it cannot be read ({error}); copy it again") from None
    return rows


def _open(file: Path) -> IO[str]:
    return gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8")


def _parse(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}, column {error.colno}: broken JSON ({error.msg}); copy the file again") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, got {type(row).__name__}; copy the file again")
    return row


def _once(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    return list({tuple(row.values()): row for row in rows}.values())


def _write(files: dict[Path, list[dict[str, Any]]]) -> None:
    """All files, each complete or absent."""
    try:
        for file, rows in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
            part = file.with_name(f"{file.name}.part")
            part.write_text(f"[\n{text}\n]\n", encoding="utf-8", newline="\n")
            os.replace(part, file)
    except OSError as error:
        raise DataError(f"{file.parent}: it cannot be written ({error}); give another --path") from None
