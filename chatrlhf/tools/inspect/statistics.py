"""What is in a file of rows, counted in one pass; some thirty bytes of a row are kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from chatrlhf.conversation import Conversation
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.files import read_rows
from chatrlhf.data.json_row import Row, digest
from chatrlhf.data.long_rows import announce_if_long
from chatrlhf.data.records import from_json, to_json
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.sources.catalogue import SOURCES
from chatrlhf.data.stage_rows import texts_of
from chatrlhf.tools.inspect.token_lengths import Lengths, lengths_of


def records_in(path: Path, dataset: str | None) -> Iterator[tuple[Row, Conversation | LeftOut]]:
    """Each row with the records it gives.

    Args:
        dataset: whose rows these are, a key of `SOURCES`; None for this project's own.
    """
    rows = read_rows(path)
    if dataset is None:
        yield from ((row, from_json(row)) for row in rows)
        return
    source = SOURCES[dataset]
    for row in rows if source.gather is None else source.gather(rows):
        yield from ((row, record) for record in source.records(row))


@dataclass
class Numbers:
    """Many numbers of one kind."""

    values: array = field(default_factory=lambda: array("d"))

    @staticmethod
    def whole() -> Numbers:
        """For numbers from 0 to 4,294,967,295 without a fraction, in half of the memory."""
        return Numbers(array("I"))

    def add(self, value: float) -> None:
        self.values.append(value)

    def __len__(self) -> int:
        return len(self.values)

    def summary(self) -> dict[str, float]:
        """Least, quartiles, 95th percentile, greatest, mean and deviation."""
        numbers = np.asarray(self.values, dtype=np.float64)
        at = np.quantile(numbers, [0, 0.25, 0.5, 0.75, 0.95, 1])
        names = ("min", "25%", "median", "75%", "95%", "max")
        return dict(zip(names, map(float, at), strict=True)) | {
            "mean": float(numbers.mean()),
            "std": float(numbers.std()),
        }

    def histogram(self, bins: int = 12) -> list[tuple[float, float, int]]:
        """(from, to, how many) of equal steps; of few whole numbers a step for each."""
        numbers = np.asarray(self.values, dtype=np.float64)
        low, high = float(numbers.min()), float(numbers.max())
        if high - low < bins and bool((numbers == np.round(numbers)).all()):
            edges = np.arange(low, high + 2) - 0.5
        else:
            edges = np.linspace(low, high, bins + 1)
        counts, edges = np.histogram(numbers, edges)
        return [(float(a), float(b), int(count)) for a, b, count in zip(edges, edges[1:], counts, strict=False)]


@dataclass
class Statistics:
    """Counts and lengths of a file; lengths are in tokens, as training would count them."""

    context: int  # tokens of prompt and completion together that a model can read
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    prompt_tokens: Numbers = field(default_factory=Numbers.whole)
    completion_tokens: Numbers = field(default_factory=Numbers.whole)
    tokens: Numbers = field(default_factory=Numbers.whole)  # the prompt with its longest completion, or the text
    scores: Numbers = field(default_factory=Numbers)
    turns: Numbers = field(default_factory=Numbers.whole)
    too_long: int = 0
    generated_by: Counter[str] = field(default_factory=Counter)
    _whole: array = field(default_factory=lambda: array("Q"))
    _prompts: array = field(default_factory=lambda: array("Q"))

    @property
    def records(self) -> int:
        return len(self._whole)

    @property
    def repeated_records(self) -> int:
        """Records that say what an earlier one says."""
        return _repeats(self._whole)

    @property
    def repeated_prompts(self) -> int:
        """Records whose prompt an earlier one has."""
        return _repeats(self._prompts)

    def add(self, record: Conversation) -> None:
        """Count a record in, but for its lengths."""
        self.kinds.update(kinds_of(record))
        values = to_json(record)
        values.pop("provenance", None)
        self._whole.append(digest(repr(values)))
        if record.provenance.generated_by:
            self.generated_by[record.provenance.generated_by] += 1
        for answer in record.scored:
            if answer.score is not None:
                self.scores.add(answer.score)
        if record.text is None:
            self._prompts.append(digest(record.prompt.text))
            self.turns.add(len(record.prompt.turns))

    def add_lengths(self, lengths: Lengths) -> None:
        """Count the lengths of a record in."""
        if lengths.prompt is not None:
            self.prompt_tokens.add(lengths.prompt)
        for each in lengths.completions:
            self.completion_tokens.add(each)
        self.tokens.add(lengths.whole)
        self.too_long += lengths.whole > self.context


def count(records: Iterable[tuple[Row, Conversation | LeftOut]], encoder: Encoder) -> Statistics:
    """Statistics of a file's records, which are read as they are counted, at the context of the encoder."""
    statistics = Statistics(encoder.max_length)
    for lengths in lengths_of(_added(records, statistics), encoder):
        statistics.add_lengths(lengths)
    return statistics


def _added(records: Iterable[tuple[Row, Conversation | LeftOut]], statistics: Statistics) -> Iterator[Conversation]:
    """Each record, once it is counted in."""
    last: Row | None = None
    for row, record in records:
        statistics.rows += row is not last
        last = row
        if isinstance(record, LeftOut):
            statistics.left_out[record.reason] += 1
        else:
            announce_if_long(row.place, texts_of(record))
            statistics.add(record)
            yield record


def kinds_of(record: Conversation) -> list[str]:
    """What a record holds, in the words of the report."""
    scored = [answer.score is not None for answer in record.scored]
    held = {
        "plain text": record.text is not None,
        "a completion": record.completion is not None,
        "scored completions": any(scored),
        "completions yet to be scored": not all(scored),
        "ranked completions": bool(record.ranked),
        "a chosen and a rejected completion": record.pair is not None,
    }
    return [kind for kind, is_held in held.items() if is_held] or ["a prompt alone"]


def _repeats(digests: array) -> int:
    # Beside each other once they are sorted, where they lie. np.unique puts them into a table, of six times their size.
    ordered = np.frombuffer(digests, dtype=np.uint64)
    ordered.sort()
    return int(np.count_nonzero(ordered[1:] == ordered[:-1]))
