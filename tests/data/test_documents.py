"""What the PRETRAIN stage reads: text files, rows of text, mixtures; and what is held out of them."""

from __future__ import annotations

import gzip
import json
import tracemalloc

import pytest

from chatrlhf.config.load import load_config
from chatrlhf.data.documents import read_documents
from chatrlhf.data.inputs import corpus
from chatrlhf.data.stage_rows import PlainText
from chatrlhf.errors import ConfigError, DataError


def read(section: dict, notes: list[str] | None = None):
    return read_documents(load_config({"pretrain_config": section}), [] if notes is None else notes)


def jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
    return str(path)


def texts(documents) -> list[str]:
    return [row.text for row in documents]


@pytest.mark.parametrize("name", ["play.txt", "play.txt.gz"])
def test_of_one_document_the_end_is_held_out(tmp_path, name):
    lines = [f"line {i} of the play" for i in range(100)]
    text = "\n".join(lines) + "\n"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    found = read({"train_dataset_path": str(path), "validation_fraction": 0.2})
    (train,), (held_out,) = found.train, found.held_out
    assert train.text + held_out.text == text
    assert held_out.text.startswith("line ") and 0.19 < len(held_out.text) / len(text) < 0.22
    assert not train.ends and held_out.ends
    assert list(found.in_order()) == [train] and list(found.files) == [str(path)]


def test_all_is_trained_where_nothing_is_to_be_held_out(tmp_path):
    (tmp_path / "play.txt").write_text("a play")
    found = read({"train_dataset_path": str(tmp_path / "play.txt"), "validation_fraction": 0.0})
    assert list(found.train) == [PlainText("a play")] and not len(found.held_out)


def test_of_rows_documents_are_held_out_and_repeated_ones_left_out(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [f"text {i}" for i in range(50)] + ["text 7"])
    found = read({"train_dataset_path": path, "validation_fraction": 0.1})
    assert len(found.train) == 45 and len(found.held_out) == 5
    assert sorted(texts(found.train) + texts(found.held_out)) == sorted(f"text {i}" for i in range(50))
    assert sorted(texts(found.in_order())) == sorted(texts(found.train))
    kept = read({"train_dataset_path": path, "validation_fraction": 0.0, "deduplicate": False})
    assert texts(kept.train).count("text 7") == 2


def test_a_validation_file_takes_the_place_of_what_would_be_held_out(tmp_path):
    path, other = jsonl(tmp_path / "a.jsonl", ["a", "b"]), jsonl(tmp_path / "b.jsonl", ["c"])
    found = read({"train_dataset_path": path, "validation_dataset_path": other})
    assert sorted(texts(found.train)) == ["a", "b"] and texts(found.held_out) == ["c"]
    assert list(found.files) == [path, other]


def test_a_mixture_of_documents(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", [f"own {i}" for i in range(20)])
    stories = jsonl(tmp_path / "train.jsonl", [f"story {i} " + "x" * 90 + str(i) for i in range(10)], field="TEXT")
    notes: list[str] = []
    found = read(
        {
            "datasets": [
                {own: {"fraction": 0.5, "val_split": 0.0}},
                # The two pieces of a story stay on one side.
                {"fanfics": {"source": stories, "max_chunk_size": 60, "max_val_set": 3, "val_split": 0.2}},
            ]
        },
        notes,
    )
    assert len(found.held_out) == 2 and len(found.epochs.rows[0]) == 10 + 18
    pieces = [row for row in found.train if not row.text.startswith("own")]
    assert max(len(row.text) for row in pieces) == 60 and sum(row.ends for row in pieces) == 9
    assert notes[0] == "PRETRAIN: 28 rows in training, 2 held out"
    first, second = (sorted(found.epochs.rows[i]) for i in (0, 1))
    assert first != second
    own_seen = [row.text for row in list(found.in_order())[:56] if row.text.startswith("own")]
    assert len(own_seen) == len(set(own_seen)) == 20  # the second epoch has the other half


def test_the_same_part_where_nothing_is_to_be_drawn_anew(tmp_path):
    own = jsonl(tmp_path / "own.jsonl", [f"own {i}" for i in range(20)])
    entry = {own: {"fraction": 0.5, "val_split": 0.0}}
    assert len(read({"datasets": [entry], "resample": False}).epochs.rows) == 1


def test_dialogues_are_refused_with_their_row(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"user_input": "a", "completion": "b"}]))
    with pytest.raises(DataError, match="rows.json, row 1, it holds a dialogue and no plain text"):
        read({"train_dataset_path": str(tmp_path / "rows.json")})


def test_what_is_missing_is_named_by_its_key(tmp_path):
    with pytest.raises(ConfigError, match="pretrain_config.train_dataset_path: no file is named"):
        read({})
    with pytest.raises(ConfigError, match="pretrain_config.train_dataset_path: file 'nowhere.txt' does not exist"):
        read({"train_dataset_path": "nowhere.txt"})
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match="pretrain_config.validation_dataset_path: file 'nowhere.txt'"):
        read({"train_dataset_path": str(tmp_path / "a.txt"), "validation_dataset_path": "nowhere.txt"})


def test_many_documents_are_not_in_memory_together(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", (f"{i} " + "words and words " * 2000 for i in range(400)))
    tracemalloc.start()
    found = read({"train_dataset_path": path})
    total = sum(len(row.text) for row in found.in_order())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 11e6 and peak < 4e6


def test_a_tokenizer_made_on_the_spot_knows_the_text(tmp_path):
    (tmp_path / "play.txt").write_text("to be or not")
    config = load_config({"pretrain_config": {"train_dataset_path": str(tmp_path / "play.txt")}})
    assert corpus(config) == ["to be or not"]
