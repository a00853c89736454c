"""A journal holds every whole line, whatever happened to its last one, and is one process's."""

import pytest

from chatrlhf.errors import DataError
from chatrlhf.tools.synth.journal import Journal
from chatrlhf.tools.synth.llm import Reply

REPLIES = {
    "a": Reply("a text\nof two lines, é and \ud83d", 3, 4),
    "b": Reply("", None, None, finished=False),
    "c": Reply("", 1, 0, refusal="not that"),
}


def test_what_was_written_is_there_again(tmp_path):
    path = tmp_path / "deep" / "x.journal.jsonl"
    with Journal(path) as journal:
        for key, reply in REPLIES.items():
            journal.add(key, reply)
        assert path.read_bytes().count(b"\n") == 3  # at once, not when it is closed
    with Journal(path) as journal:
        assert journal.replies == REPLIES


def test_half_a_line_is_taken_away_and_no_other(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path) as journal:
        for key, reply in REPLIES.items():
            journal.add(key, reply)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for end in range(second, len(whole)):
        path.write_bytes(whole[:end])
        with Journal(path) as journal:
            assert list(journal.replies) == ["a", "b"]
            journal.add("c", REPLIES["c"])
        assert path.read_bytes() == whole


def test_two_processes_do_not_write_to_one(tmp_path):
    path = tmp_path / "x.journal.jsonl"
    with Journal(path), pytest.raises(DataError, match="another process"):
        Journal(path)
    with Journal(path):
        pass


@pytest.mark.parametrize("line", ["no json", "[]", '{"text": "without key"}', '{"key": "a", "more": 1}'])
def test_another_file_is_not_taken_for_one(tmp_path, line):
    path = tmp_path / "x.journal.jsonl"
    path.write_text(f"{line}\n")
    with pytest.raises(DataError, match="line 1: this is no journal"):
        Journal(path)
    assert path.read_text() == f"{line}\n"
