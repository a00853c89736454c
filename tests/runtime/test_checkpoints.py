"""Folders that are complete or absent: which checkpoints stay, which is the newest, and what is not one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.atomic_files import CONTENTS, publish_folder, replace_file, why_invalid
from chatrlhf.runtime.checkpoints import CheckpointStore, StageFiles


def weights(text: str = "weights"):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_text(text, encoding="utf-8")

    return write


@pytest.fixture
def store(tmp_path):
    said: list[str] = []
    made = CheckpointStore(tmp_path / "ACTOR", keep=2, warn=said.append)
    made.said = said
    return made


def test_the_newest_stay_by_number_and_not_as_text(store):
    (store.folder / "step-by-hand").mkdir(parents=True)  # somebody's own
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        store.publish(step, weights())
    assert sorted(path.name for path in store.folder.iterdir()) == ["step-1000000", "step-1000001", "step-by-hand"]
    assert store.newest() == (1_000_001, store.folder / "step-1000001") and store.said == []


def test_no_checkpoint_is_none(store):
    assert store.newest() is None


def cut_short(folder):
    (folder / "model" / "weights.bin").write_text("weight", encoding="utf-8")


def another_byte(folder):
    (folder / "model" / "weights.bin").write_text("Weights", encoding="utf-8")


def gone(folder):
    (folder / "model" / "weights.bin").unlink()


def says(text):
    return lambda folder: (folder / CONTENTS).write_text(text, encoding="utf-8")


DAMAGE = [
    (cut_short, "model/weights.bin has 6 bytes, expected 7"),
    (another_byte, "model/weights.bin does not have its SHA-256"),
    (gone, "model/weights.bin is missing"),
    (lambda folder: (folder / CONTENTS).unlink(), "contents.json is missing"),
    (says("{"), "contents.json is not valid JSON"),
    (says("[" * 100_000), "contents.json is not valid JSON"),
    (says("{}"), "contents.json lists no files"),
    (says("[1]"), "contents.json lists no files"),
    (says('{"model/weights.bin": {"bytes": 7}}'), "contents.json says nothing of model/weights.bin"),
    (says('{"model/weights.bin": 7}'), "contents.json says nothing of model/weights.bin"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[reason for _, reason in DAMAGE])
def test_a_damaged_one_is_passed_over_and_said(store, damage, reason):
    store.publish(4, weights())
    store.publish(8, weights())
    assert why_invalid(store.folder / "step-000008") is None
    damage(store.folder / "step-000008")
    assert store.newest() == (4, store.folder / "step-000004")
    assert store.said == [f"checkpoint {store.folder / 'step-000008'} is damaged ({reason}); trying the one before"]


def test_where_none_is_valid_it_says_so(store):
    store.publish(4, weights())
    cut_short(store.folder / "step-000004")
    with pytest.raises(CheckpointError, match=r"none of its 1 checkpoints is valid \(last: model/weights.bin has 6"):
        store.newest()


def test_contents_have_size_and_hash_of_each_file(tmp_path):
    publish_folder(tmp_path / "actor", weights())
    sha256 = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"
    contents = json.loads((tmp_path / "actor" / CONTENTS).read_text(encoding="utf-8"))
    assert contents["model/weights.bin"] == {"bytes": 7, "sha256": sha256}


def test_a_write_that_fails_leaves_the_one_before_and_nothing_else(tmp_path):
    publish_folder(tmp_path / "actor", weights("first"))

    def fails(folder: Path) -> None:
        weights("second")(folder)
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        publish_folder(tmp_path / "actor", fails)
    assert (tmp_path / "actor" / "model" / "weights.bin").read_text(encoding="utf-8") == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]


@pytest.mark.parametrize("leftover", [".replaced-actor", ".writing-actor"])
def test_what_a_kill_has_left_is_cleared_away(tmp_path, leftover):
    publish_folder(tmp_path / leftover, weights("first"))
    publish_folder(tmp_path / "actor", weights("second"))
    assert [path.name for path in tmp_path.iterdir()] == ["actor"]
    assert (tmp_path / "actor" / "model" / "weights.bin").read_text(encoding="utf-8") == "second"


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    """The old folder is moved aside by then and the new one not yet in its place: the next publication begins there."""
    publish_folder(tmp_path / ".replaced-actor", weights("first"))

    def fails(folder: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        publish_folder(tmp_path / "actor", fails)
    assert (tmp_path / "actor" / "model" / "weights.bin").read_text(encoding="utf-8") == "first"


def test_a_file_is_replaced_whole(tmp_path):
    replace_file(tmp_path / "new" / "manifest.json", "one\n")
    replace_file(tmp_path / "new" / "manifest.json", "two\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["manifest.json"]
    assert (tmp_path / "new" / "manifest.json").read_bytes() == b"two\n"


@pytest.mark.parametrize(("resume", "newest"), [(True, 4), (False, None)])
def test_a_stage_goes_on_from_a_checkpoint_only_when_asked(store, resume, newest):
    store.publish(4, weights())
    files = StageFiles("ACTOR", store, store.folder.parent / "scratch", resume, lambda: None)
    assert files.newest == (newest and (4, store.folder / "step-000004"))


def test_a_stage_begins_by_clearing_away_and_by_its_record(store):
    store.publish(4, weights())
    half, scratch, records = store.folder / ".writing-step-000008", store.folder.parent / "scratch", []
    half.mkdir(), scratch.mkdir()
    StageFiles("ACTOR", store, scratch, True, lambda: records.append("begun")).begin(nn.Linear(2, 2))
    assert not half.exists() and not scratch.exists() and records == ["begun"]
    assert store.newest() == (4, store.folder / "step-000004")
