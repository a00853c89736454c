"""Lengths of many records: those of each, in their order, and with few of them in memory at a time."""

import tracemalloc
import weakref

import pytest
import tiny

from chatrlhf.conversation import Conversation, Pair, Prompt, Scored, Turn
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.json_row import Row
from chatrlhf.data.sources import LeftOut
from chatrlhf.data.stage_rows import completions_of
from chatrlhf.data.templates import FORMATS, Template
from chatrlhf.errors import DataError
from chatrlhf.tools.inspect import token_lengths
from chatrlhf.tools.inspect.statistics import count
from chatrlhf.tools.inspect.token_lengths import Lengths, lengths_of

SHAPES = [
    lambda text: Conversation(Prompt.of(text), completion=f"{text} sat"),
    lambda text: Conversation(Prompt((Turn("user", text), Turn("assistant", text), Turn("user", "on")), system=text)),
    lambda text: Conversation(Prompt.of("the"), scored=(Scored(text, 1.0), Scored("", None)), pair=Pair(text, "mat")),
    lambda text: Conversation(text=text),
]
RECORDS = [SHAPES[i % 4](" the cat" * (i * 7 % 23)) for i in range(200)]


def encoder(template: Template = FORMATS["hh"]) -> Encoder:
    return Encoder(tiny.tokenizer(), template, 64)


def one_by_one(record: Conversation, made: Encoder) -> Lengths:
    if record.text is not None:
        return Lengths(None, (), len(made.plain(record.text)[0]))
    prompt = len(made.prompt(record.prompt))
    completions = tuple(len(made.completion("a", text)) for text in completions_of(record))
    return Lengths(prompt, completions, prompt + max(completions, default=0))


@pytest.mark.parametrize("chunk", [1, 700, 10**6])
@pytest.mark.parametrize("threads", [1, 3])
def test_lengths_are_those_of_each_record_in_their_order(monkeypatch, chunk, threads):
    monkeypatch.setattr(token_lengths, "CHUNK", chunk)
    monkeypatch.setattr(token_lengths, "THREADS", threads)
    made = encoder()
    assert list(lengths_of(iter(RECORDS), made)) == [one_by_one(record, made) for record in RECORDS]
    assert list(lengths_of([], made)) == []


class Alive:
    """Objects that pass by, and how many of them were there at once."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def passing(self, objects):
        for each in objects:
            self.now += 1
            self.most = max(self.most, self.now)
            weakref.finalize(each, self._gone)
            yield each

    def _gone(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("kind", ["of records", "of empty texts", "that are left out"])
def test_rows_are_read_as_they_are_counted(monkeypatch, kind):
    monkeypatch.setattr(token_lengths, "CHUNK", 10 * token_lengths.OF_A_RECORD)  # ten records at most
    monkeypatch.setattr(token_lengths, "THREADS", 2)
    made = {
        "of records": lambda i: Conversation(Prompt.of(f"the cat {i}"), completion="sat"),
        "of empty texts": lambda i: Conversation(text=""),
        "that are left out": lambda i: LeftOut(f"{i % 2}"),
    }[kind]
    rows, records = Alive(), Alive()
    given = zip(
        rows.passing(Row({}, str(i)) for i in range(1000)), records.passing(map(made, range(1000))), strict=True
    )
    statistics = count(given, encoder())
    assert statistics.rows == 1000 and statistics.records + sum(statistics.left_out.values()) == 1000
    # Those that wait, those that are being tokenized, and those that are being read.
    assert rows.most <= 3 and records.most <= 10 * (2 + 2 + 2), (rows.most, records.most)


@pytest.mark.slow
def test_a_few_bytes_of_a_row_are_kept(monkeypatch):
    monkeypatch.setattr(token_lengths, "CHUNK", 2000)
    made = encoder()

    def peak(rows: int) -> int:
        tracemalloc.start()
        count(
            ((Row({}, ""), Conversation(Prompt.of(f"the cat {i}"), completion=f"sat {i}")) for i in range(rows)), made
        )
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(5000)  # what is made once, whatever the number of rows
    assert (peak(5000) - peak(1000)) / 4000 < 60  # bytes; two digests and four lengths are 32


def test_what_is_wrong_reaches_the_caller():
    def broken():
        yield RECORDS[0]
        raise DataError("row 2: broken")

    with pytest.raises(DataError, match="row 2: broken"):
        list(lengths_of(broken(), encoder()))
    forgetful = Template("{{ messages[0].content }}{{ 'A:' if add_generation_prompt }}")
    with pytest.raises(DataError, match="leaves out or changes"):
        list(lengths_of([RECORDS[1]], encoder(forgetful)))
