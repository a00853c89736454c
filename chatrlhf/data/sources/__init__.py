"""Public datasets, one file each: where they lie and how a row becomes records. `catalogue.py` has them by name."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from chatrlhf.conversation import Conversation, Prompt, Provenance, Turn
from chatrlhf.data.json_row import LoneSurrogate, Row
from chatrlhf.errors import DataError


@dataclass(frozen=True)
class LeftOut:
    """A row, or a part of one, that is no record, and why; the reason is a plural that a count can precede."""

    reason: str


Converted = Iterable[Conversation | LeftOut]
EMPTY_REPLY = LeftOut("empty replies")


@dataclass(frozen=True)
class Source:
    """A dataset on the hub, or a copy of it in the hub's layout."""

    hub_name: str
    licence: str
    size: str  # for people
    template: str  # the template that fits the prompts
    convert: Callable[[Row], Converted]  # raises DataError where the row is not of this dataset
    subsets: tuple[str, ...] = ()  # folders that `convert` understands; none: the files are one set
    splits: tuple[str, ...] = ("train",)
    pairs_per_prompt: int | None = None
    key: Callable[[Row], Hashable] | None = None  # of rows that share one only the first is taken
    language: Callable[[Row], str] | None = None
    # Rows in the file's order to rows that are each a whole, where one of the file is not.
    gather: Callable[[Iterator[Row]], Iterator[Row]] | None = None
    is_huge: bool = False  # too large to keep on one machine
    loss_on: str | None = None  # what is trained of it, where that is not the completion

    def records(self, row: Row, lang: str | None = None) -> list[Conversation | LeftOut]:
        """The records of a row that can be trained on, each with where it came from; or why there are none.

        Args:
            lang: only rows in this language.

        Raises:
            DataError: the row is not of this dataset.
        """
        try:
            if lang is not None and self.language(row) != lang:
                return [LeftOut("rows in another language")]
            return [self._usable(record) for record in self.convert(row)]
        except LoneSurrogate:
            return [LeftOut("texts with half a character (a lone surrogate)")]
        except DataError as error:
            raise DataError(f"{error}; check that this is the dataset you asked for") from None

    def _usable(self, record: Conversation | LeftOut) -> Conversation | LeftOut:
        if isinstance(record, LeftOut):
            return record
        if record.text is None and not (record.prompt.text.strip() or record.prompt.reply_name):
            return LeftOut("empty prompts")
        if record.pair is not None and record.pair.chosen == record.pair.rejected:
            return LeftOut("replies that are the same")
        return replace(record, provenance=replace(record.provenance, dataset=self.hub_name, licence=self.licence))


def answered(
    prompt: str, completion: str, by: str | None = None, row: str | None = None, system: str | None = None
) -> Conversation | LeftOut:
    """A question with its answer, by which model, where both are there."""
    if not prompt.strip():
        return LeftOut("empty prompts")
    if not completion.strip():
        return EMPTY_REPLY
    asked = Prompt((Turn("user", prompt),), system=system)
    return Conversation(asked, completion=completion, provenance=Provenance(row=row, generated_by=by))


def with_input(instruction: str, more: str | None) -> str:
    """An instruction with what it is about below it."""
    return f"{instruction}\n\n{more}" if more and more.strip() else instruction


def document(text: str) -> Conversation | LeftOut:
    """Plain text for language modeling."""
    return Conversation(text=text) if text.strip() else LeftOut("empty texts")
