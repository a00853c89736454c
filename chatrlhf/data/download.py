"""A public dataset to ChatLLaMA's three files, read from the hub or from a local copy of it.

    actor_training_data.json    {"user_input", "completion"}            the preferred reply; or {"text"}
    reward_training_data.json   {"user_input", "chosen", "rejected"}    both replies; or {"user_input", "ranked"}
    rlhf_training_data.json     {"user_input"}

All three come from the same sampled rows, as with ChatLLaMA, and hold what repeats only once. A file for which the
dataset has nothing is not written. They are published together, so that a call that was killed can be made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from chatrlhf.conversation import Conversation, Prompt, Provenance
from chatrlhf.data import stage_rows
from chatrlhf.data.files import write_rows
from chatrlhf.data.hub import from_copy, from_hub
from chatrlhf.data.json_row import Row
from chatrlhf.data.records import to_json
from chatrlhf.data.sources import LeftOut, Source
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.errors import DataError
from chatrlhf.runtime.publication import Publication

ACTOR, REWARD, PROMPTS = "actor_training_data.json", "reward_training_data.json", "rlhf_training_data.json"
KEYS = {
    ACTOR: "actor_config.train_dataset_path",
    REWARD: "reward_config.train_dataset_path",
    PROMPTS: "trainer_config.examples_path",
}


@dataclass(frozen=True)
class Download:
    """What was written, what was left out and why."""

    source: Source
    rows: dict[Path, int]
    taken: int  # rows of the dataset
    asked: int
    left_out: Counter[str]
    notes: list[str]

    def lines(self) -> list[str]:
        """A report for people, and what to do next."""
        lines = [*self.notes, *(f"wrote {path}: {count:,} rows" for path, count in self.rows.items())]
        if self.taken < self.asked:
            lines.append(f"asked for {self.asked:,} rows, {self.taken:,} were there")
        lines += [f"left out {count:,}: {reason}" for reason, count in sorted(self.left_out.items())]
        written = {path.name: path for path in self.rows}
        if REWARD not in written:
            lines.append("no rows for the reward model: nothing in this dataset is scored, ranked or preferred")
        lines += ["next, in your configuration:", f"  actor_config.template: {self.source.template}"]
        if self.source.loss_on:
            lines.append(f"  actor_config.loss_on: {self.source.loss_on}")
        return lines + [f"  {key}: {written[name]}" for name, key in KEYS.items() if name in written]


def download(
    name: str,
    path: Path,
    number_of_samples: int = 200,
    *,
    source_dir: Path | None = None,
    subset: str | None = None,
    split: str = "train",
    lang: str | None = None,
    seed: int = 0,
    force: bool = False,
) -> Download:
    """Draw rows, from the subsets in turn and at random within each, and write the three files.

    Args:
        name: a key of `SOURCES`.
        path: folder of the three files.
        number_of_samples: rows of the dataset that are used, a row being a pair, a dialogue, or a tree of
            messages; fewer where there are fewer.
        source_dir: a local copy in the hub's layout, or one of its files, read instead of the hub.
        subset: null: all of them.
        split: where a local copy lacks it, what is there is taken.
        lang: of a dataset in many languages only this one, such as ``en``.
        seed: the same seed draws the same rows (from the hub not the same as from a local copy).
        force: overwrite files that are there.

    Raises:
        LockedError: another process writes into the folder.
        DataError: files would be overwritten, nothing usable was found, a row is not of this dataset, the hub
            cannot be reached, or the folder cannot be written.
    """
    source = SOURCES[name]
    if number_of_samples < 1:
        raise DataError(f"number_of_samples: {number_of_samples} is too few; ask for at least 1")
    if lang is not None and source.language is None:
        raise DataError(f"--lang: the rows of {source.hub_name} do not say which language they are in; leave it out")
    if subset is not None and not source.subsets:
        raise DataError(f"--subset: {source.hub_name} has none; leave it out")
    folder = path.expanduser()
    with Publication(folder, "download", "--path") as publication:
        existing = [str(file) for file in publication.in_the_way(folder / file for file in KEYS)]
        if existing and not force:
            raise DataError(f"refused to overwrite {', '.join(existing)}; give another --path, or --force")
        rows, report = _rows(source, folder, number_of_samples, source_dir, subset, split, lang, seed)
        publication.publish({file: partial(write_rows, rows=of_file) for file, of_file in rows.items()}, force)
    return report


def _rows(
    source: Source,
    folder: Path,
    number_of_samples: int,
    source_dir: Path | None,
    subset: str | None,
    split: str,
    lang: str | None,
    seed: int,
) -> tuple[dict[Path, list[dict[str, Any]]], Download]:
    """What the files are to hold, and the report of it; as `download` has the arguments."""
    notes: list[str] = []
    if source_dir is None:
        streams = from_hub(source, subset, split, seed)
    else:
        streams = from_copy(source, source_dir.expanduser(), subset, split, seed, notes)
    records, taken, left_out = _draw(source, _in_turn(streams), number_of_samples, lang)
    if not records:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "there are no rows"
        raise DataError(f"{source_dir or source.hub_name}: no usable row was found ({reasons}); choose another subset")
    rows = {
        folder / ACTOR: _once(_demonstration(record) for record in records),
        folder / REWARD: _once(replace(record, completion=None) for record in records if stage_rows.is_judged(record)),
        folder / PROMPTS: _once(
            Conversation(p, provenance=r.provenance) for r in records for p in stage_rows.prompts(r)
        ),
    }
    rows = {file: of_file for file, of_file in rows.items() if of_file}
    counts = {file: len(of_file) for file, of_file in rows.items()}
    return rows, Download(source, counts, taken, number_of_samples, left_out, notes)


def _draw(
    source: Source, rows: Iterable[Row], wanted: int, lang: str | None
) -> tuple[list[Conversation], int, Counter[str]]:
    """Records of the first rows that give any, how many rows these are, and what was left out."""
    records: list[Conversation] = []
    left_out: Counter[str] = Counter()
    of_prompt: Counter[Prompt] = Counter()
    keys: set[Hashable] = set()
    taken = 0
    for row in rows:
        if taken == wanted:
            break
        drawn = []
        if source.key is not None:
            if (key := source.key(row)) in keys:
                left_out["rows that repeat another"] += 1
                continue
            keys.add(key)
        for record in source.records(row, lang):
            if isinstance(record, LeftOut):
                left_out[record.reason] += 1
            elif source.pairs_per_prompt and of_prompt[record.prompt] >= source.pairs_per_prompt:
                left_out[f"more than {source.pairs_per_prompt} of one prompt"] += 1
            else:
                of_prompt[record.prompt] += 1
                drawn.append(record)
        records += drawn
        taken += bool(drawn)
    return records, taken, left_out


def _demonstration(record: Conversation) -> Conversation | None:
    """What the actor imitates: the text or the completion, or the best of several."""
    if record.text is not None:
        return record
    drawn = stage_rows.demonstrations(record)
    if not drawn:
        return None
    return Conversation(record.prompt, completion=drawn[0].completion, provenance=record.provenance)


def _in_turn(streams: list[Iterator[Row]]) -> Iterator[Row]:
    """One row of each stream, again and again, until all are used up."""
    while streams:
        going = []
        for stream in streams:
            if (item := next(stream, None)) is not None:
                going.append(stream)
                yield item
        streams = going


def _once(records: Iterable[Conversation | None]) -> list[dict[str, Any]]:
    """Rows in JSON; of records that differ in where they came from alone, the first."""
    first: dict[Conversation, Conversation] = {}
    for record in records:
        if record is not None:
            first.setdefault(replace(record, provenance=Provenance()), record)
    return [to_json(record) for record in first.values()]
