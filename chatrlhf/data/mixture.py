"""Several datasets as one: what is held out, what is taken of the rest, and in which order it is seen.

Rows stay where they are. One pass reads them all and keeps some forty bytes of each; afterwards a row is read again
when it is asked for. Everything is drawn by the seed and by what the rows say, not by where they stand, so that two
runs with one seed see the same mixture, and every process of a run has the same.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from chatrlhf.conversation import Conversation
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.json_row import Row, digest
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.stage_rows import Demonstration, PlainText
from chatrlhf.errors import DataError


@dataclass(frozen=True)
class MixtureEntry:
    """A dataset of a mixture, before anything is drawn from it."""

    name: str
    rows: Sequence[Row]
    convert: Callable[[Row], Iterable[Conversation | LeftOut]]
    draw: Callable[[Conversation], list[Any]]  # what its stage has of a record
    held_out_share: float = 0.0
    held_out_most: int | None = None
    fraction: float = 1.0
    size: int | None = None
    weight: float = 1.0
    max_chunk_size: int | None = None  # characters
    drop_narrative: float = 0.0  # share of the records that lose their narrative
    loss_on: str | None = None  # what is trained of a demonstration
    key: Callable[[Row], Hashable] | None = None  # of rows that share one only the first is taken
    most_per_prompt: int | None = None  # rows

    def drawn(self, index: int) -> list[tuple[Any, Conversation] | LeftOut]:
        """The stage's rows of a row, each with its record; or why there are none.

        Raises:
            DataError: the row is not of this dataset.
        """
        records = list(self.convert(self.rows[index]))
        made: list[tuple[Any, Conversation] | LeftOut] = []
        for record in records:
            if isinstance(record, LeftOut):
                made.append(record)
                continue
            try:
                told = self._progress(record)
                told = replace(told, prompt=replace(told.prompt, place=self.rows[index].place))
                rows = [piece for row in self.draw(told) for piece in self._pieces(row)]
            except DataError as error:
                raise DataError(f"{self.rows[index].place}, {error}") from None
            made += [(row, record) for row in rows] or [LeftOut("records without use for this stage")]
        return made

    def _progress(self, record: Conversation) -> Conversation:
        """The record, some without their narrative: which, follows from what they say, whenever they are read."""
        if not self.drop_narrative or digest(repr(record.prompt)) >= self.drop_narrative * 2**64:
            return record
        return replace(record, prompt=replace(record.prompt, narrative=None))

    def _pieces(self, row: Any) -> list[Any]:
        if isinstance(row, Demonstration) and self.loss_on is not None:
            return [replace(row, loss_on=self.loss_on)]
        if not isinstance(row, PlainText) or self.max_chunk_size is None:
            return [row]
        size = self.max_chunk_size
        pieces = [row.text[start : start + size] for start in range(0, len(row.text), size)]
        return [replace(row, text=piece, ends=row.ends and i == len(pieces) - 1) for i, piece in enumerate(pieces)]


@dataclass
class Share:
    """What became of a dataset."""

    name: str
    available: int = 0  # rows that could have been trained on
    train: int = 0  # rows that an epoch sees
    later: int = 0  # rows that later epochs see and the first does not
    held_out: int = 0
    repeated: int = 0  # rows that say what another does
    also_held_out: int = 0  # rows that share a prompt, or a group, with one that is held out
    left_out: Counter[str] = field(default_factory=Counter)

    def reasons(self) -> str:
        """What was left out and why; empty where nothing was."""
        reasons = Counter(self.left_out)
        reasons["rows that repeat another"] += self.repeated
        reasons["rows that share a prompt or a group with one that is held out"] += self.also_held_out
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()) if count)


@dataclass(frozen=True)
class Mixture:
    """The rows of a stage, read when they are asked for."""

    train: Sequence[Any]  # each once
    epochs: Epochs  # which of them are seen when, and how often
    held_out: Sequence[Any]
    shares: list[Share]

    def lines(self) -> list[str]:
        """The composition, for people."""
        lines = [f"{self.epochs.size:,} rows in training, {len(self.held_out):,} held out"]
        for share in self.shares:
            of_held_out = f" ({share.held_out / len(self.held_out):.2%})" if self.held_out else ""
            of_it = f"{share.train / share.available:.2%} of it"
            if share.later:
                of_it += f", another {share.later / share.available:.2%} in later epochs"
            line = f"  {share.name}: {share.train:,} in training ({of_it}), {share.held_out:,} held out{of_held_out}"
            lines.append(line + (f"; left out: {said}" if (said := share.reasons()) else ""))
        return lines


def mix(
    entries: Sequence[MixtureEntry],
    seed: int,
    deduplicate: bool = True,
    draws: Callable[[int], int] = lambda rows: 1,
) -> Mixture:
    """Hold out, draw and shuffle.

    Args:
        deduplicate: of rows that say the same, in whichever dataset, only the first is taken.
        draws: given the rows of an epoch, how many epochs have rows of their own; the first has the same in any case.

    Raises:
        DataError: a row is not of its dataset, or nothing is left of one.
    """
    index, shares = _Index(), []
    for number, entry in enumerate(entries):
        shares.append(Share(entry.name))
        index.read(number, entry, shares[-1])
    of, content, group, prompt = index.arrays()
    keep = np.ones(len(of), dtype=bool)
    if deduplicate:
        keep[:] = False
        keep[np.unique(content, return_index=True)[1]] = True
    held_out = np.zeros(len(of), dtype=bool)
    for number, entry in enumerate(entries):
        mine = np.flatnonzero((of == number) & keep)
        shares[number].repeated += int(((of == number) & ~keep).sum())
        held_out[mine] = _held_out(group[mine], entry, seed)
        shares[number].held_out = int(held_out[mine].sum())
    shared = keep & ~held_out & (np.isin(group, group[held_out]) | np.isin(prompt, prompt[held_out]))
    orders = []
    for number, entry in enumerate(entries):
        mine = np.flatnonzero((of == number) & keep & ~held_out & ~shared)
        orders.append(mine[np.argsort(_scrambled(content[mine], seed + 1), kind="stable")])
        share = shares[number]
        share.available, share.train = len(mine), len(_consumed(orders[-1], entry, 0))
        share.also_held_out = int(((of == number) & shared).sum())
        if not share.train:
            reasons = share.reasons() or "it has no rows"
            raise DataError(f"datasets: nothing of {entry.name} is left to train on ({reasons})")
    epochs = _epochs(orders, entries, seed, draws)
    train = np.unique(np.concatenate(epochs))
    for number, share in enumerate(shares):
        share.later = int((of[np.setdiff1d(train, epochs[0])] == number).sum())
    return Mixture(
        index.rows(entries, train),
        Epochs(tuple(np.searchsorted(train, rows) for rows in epochs)),
        index.rows(entries, np.flatnonzero(held_out)),
        shares,
    )


def _held_out(group: NDArray[np.uint64], entry: MixtureEntry, seed: int) -> NDArray[np.bool_]:
    """Which rows are held out: whole groups, in an order that the seed draws, up to the number wanted."""
    wanted = round(entry.held_out_share * len(group))
    if entry.held_out_most is not None:
        wanted = min(wanted, entry.held_out_most)
    groups, member_of, sizes = np.unique(group, return_inverse=True, return_counts=True)
    chosen, count, left = np.zeros(len(groups), dtype=bool), 0, len(groups)
    for number in np.argsort(_scrambled(groups, seed)):
        if count >= wanted or left == 1:
            break
        if count + sizes[number] <= wanted:
            chosen[number] = True
            count += int(sizes[number])
            left -= 1
    return chosen[member_of] if len(group) else np.zeros(0, dtype=bool)


def _epochs(
    orders: list[NDArray[np.int64]], entries: Sequence[MixtureEntry], seed: int, draws: Callable[[int], int]
) -> list[NDArray[np.int64]]:
    """The rows of each epoch, shuffled; of one, where all would see the same."""

    def of(epoch: int) -> NDArray[np.int64]:
        return np.concatenate([_consumed(order, each, epoch) for order, each in zip(orders, entries, strict=True)])

    first = of(0)
    differ = not np.array_equal(np.sort(first), np.sort(of(1)))
    shuffle = np.random.default_rng(seed).permutation
    return [shuffle(of(epoch)) for epoch in range(draws(len(first)) if differ else 1)]


def _consumed(order: NDArray[np.int64], entry: MixtureEntry, epoch: int) -> NDArray[np.int64]:
    """The rows of one dataset that an epoch sees, some of them more than once.

    An epoch continues in ``order`` where the one before it stopped, and begins again at its end: no epoch sees rows of
    an earlier one before all have been seen, and in the long run all are seen equally often.
    """
    number = round(entry.fraction * len(order))
    if entry.size is not None:
        number = min(number, entry.size)
    whole, rest = divmod(round(entry.weight * number), max(number, 1))
    if whole == 0:
        return _shuffle_block(order, epoch, rest)
    drawn = _shuffle_block(order, epoch, number)
    return np.concatenate([*[drawn] * whole, _shuffle_block(drawn, epoch, rest)])


def _shuffle_block(order: NDArray[np.int64], epoch: int, length: int) -> NDArray[np.int64]:
    return order[(epoch * length + np.arange(length)) % max(len(order), 1)]


class _Index:
    """Of each stage row where it stands, and digests of what it says, of its group and of its prompt."""

    def __init__(self) -> None:
        self.of, self.row, self.part = array("B"), array("q"), array("l")
        self.content, self.group, self.prompt = array("Q"), array("Q"), array("Q")

    def read(self, number: int, entry: MixtureEntry, share: Share) -> None:
        seen: set[Hashable] = set()
        of_prompt: Counter[int] = Counter()
        for place in range(len(entry.rows)):
            if entry.key is not None:
                if (key := entry.key(entry.rows[place])) in seen:
                    share.repeated += 1
                    continue
                seen.add(key)
            part = 0
            for made in entry.drawn(place):
                if isinstance(made, LeftOut):
                    share.left_out[made.reason] += 1
                    continue
                row, record = made
                # Of a plain text, which has no prompt, all pieces belong together.
                prompt = repr(record.prompt) if record.text is None else record.text
                of_prompt[digest(prompt)] += 1
                if entry.most_per_prompt and of_prompt[digest(prompt)] > entry.most_per_prompt:
                    share.left_out[f"more than {entry.most_per_prompt} of one prompt"] += 1
                    part += 1
                    continue
                own_group = (record.provenance.dataset, record.provenance.group)
                self.of.append(number)
                self.row.append(place)
                self.part.append(part)
                self.content.append(digest(repr(row)))
                self.group.append(digest(repr(own_group) if own_group[1] is not None else prompt))
                self.prompt.append(digest(prompt))
                part += 1

    def arrays(self) -> tuple[NDArray[Any], ...]:
        """Of which dataset each row is, and its digests."""
        digests = (np.frombuffer(each, dtype=np.uint64) for each in (self.content, self.group, self.prompt))
        return np.frombuffer(self.of, dtype=np.uint8), *digests

    def rows(self, entries: Sequence[MixtureEntry], chosen: NDArray[np.int64]) -> MixedRows:
        part = np.frombuffer(self.part, dtype=f"i{self.part.itemsize}")
        return MixedRows(
            entries,
            np.frombuffer(self.of, dtype=np.uint8)[chosen],
            np.frombuffer(self.row, dtype=np.int64)[chosen],
            part[chosen],
        )


class MixedRows(Sequence[Any]):
    """Rows of several datasets, each read when it is asked for."""

    def __init__(self, entries: Sequence[MixtureEntry], of: Any, row: Any, part: Any) -> None:
        self.entries, self.of, self.row, self.part = entries, of, row, part

    def __len__(self) -> int:
        return len(self.of)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        made = self.entries[self.of[index]].drawn(int(self.row[index]))
        return [row for row in made if not isinstance(row, LeftOut)][self.part[index]][0]


def _scrambled(digests: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Other numbers for every seed, as good as random (the finalizer of splitmix64, Steele et al. 2014)."""
    x = digests + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
