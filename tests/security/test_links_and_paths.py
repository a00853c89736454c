"""Links and names that lead out of a folder: nothing outside is read into a result, written or removed."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress

import pytest
from hostile import line_about
from tiny import llama, tokenizer

from chatrlhf.cli import main
from chatrlhf.data.files import write_rows
from chatrlhf.models.loading.weight_files import damage, folder_damage
from chatrlhf.runtime.atomic_files import CONTENTS, publish_folder, replace_file, why_invalid
from chatrlhf.runtime.bundled_files import copy_artifacts
from chatrlhf.runtime.checkpoints import CheckpointStore
from chatrlhf.runtime.manifest import FILE_NAME, Manifest
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.skipped_steps import SkippedSteps
from chatrlhf.tools.export.hub import Repository
from chatrlhf.tools.export.weights import copy_other_files
from chatrlhf.tools.synth.journal import Journal
from chatrlhf.tools.synth.llm import Reply
from chatrlhf.tools.synth.output import Output

SECRET = "a key of somebody's"


@pytest.fixture
def outside(tmp_path):
    """A file that is none of a model's or a run's."""
    path = tmp_path / "outside" / "id_rsa"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    llama(vocab=270).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


# ----- what is read into results


@pytest.mark.parametrize("name", ["notes.txt", "chat_template.jinja", "vocab.model"])
def test_an_export_copies_no_link_out(model, outside, tmp_path, name):
    (model / name).symlink_to(outside)
    (tmp_path / "out").mkdir()
    line = line_about(lambda: copy_other_files(model, tmp_path / "out"))
    assert f"{model / name} is a link to {outside}" in line and SECRET not in line
    assert not (tmp_path / "out" / name).exists()


def test_a_delta_copies_no_link_out(model, outside, tmp_path, capsys):
    (model / "notes.txt").symlink_to(outside)
    words = ["--base", str(model), "--target", str(model), "--output", str(tmp_path / "delta")]
    assert main(["export", "delta", *words]) == 2
    assert "is a link to" in capsys.readouterr().err
    assert not (tmp_path / "delta").exists()


def test_nothing_behind_a_link_is_uploaded(model, outside, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    repository = Repository("me/mine")
    repository._api = None  # whoever asks the hub for something fails
    (model / "notes.txt").symlink_to(outside)
    assert "is a link to" in line_about(lambda: repository.push(model))


def test_the_hubs_cache_is_made_of_links(tmp_path):
    snapshot, blobs = (tmp_path / "models--me--mine" / name for name in ("snapshots/abc", "blobs"))
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "0123").write_text("{}")
    (snapshot / "config.json").symlink_to(blobs / "0123")
    (tmp_path / "out").mkdir()
    copy_other_files(snapshot, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("place", ["../outside/model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_a_list_of_shards_names_files_of_its_folder(model, place):
    (model / "model.safetensors").unlink()
    text = json.dumps({"metadata": {}, "weight_map": {"a": place}})
    (model / "model.safetensors.index.json").write_text(text)
    assert f"names {place!r}, which is not in its folder" in folder_damage(model)


# ----- what is written


def test_init_writes_through_no_dangling_link(tmp_path, outside):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "config.yaml").symlink_to(outside.parent / "new.yaml")
    assert "is there already" in line_about(lambda: copy_artifacts(folder))
    assert os.listdir(outside.parent) == ["id_rsa"] and os.listdir(folder) == ["config.yaml"]


def test_init_writes_into_no_linked_folder(tmp_path, outside):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / "artifacts").symlink_to(outside.parent)
    assert "is a link out of" in line_about(lambda: copy_artifacts(folder))
    assert os.listdir(outside.parent) == ["id_rsa"] and os.listdir(folder) == ["artifacts"]


@pytest.mark.parametrize("name", ["file.json", ".writing-file.json"])
@pytest.mark.parametrize("dangling", [False, True], ids=["file", "dangling"])
def test_a_file_is_replaced_and_not_what_a_link_leads_to(tmp_path, outside, name, dangling):
    target = outside.parent / "new" if dangling else outside
    (tmp_path / name).symlink_to(target)
    replace_file(tmp_path / "file.json", "mine")
    write_rows(tmp_path / "file.json", [{"a": 1}])
    assert outside.read_text() == SECRET and os.listdir(outside.parent) == ["id_rsa"]
    assert not (tmp_path / "file.json").is_symlink()


def test_a_folder_is_published_beside_a_link(tmp_path, outside):
    """What a link in its place, or in that of what is being written, leads to is left alone."""
    for name in ("step", ".writing-step", ".replaced-step"):
        (tmp_path / name).symlink_to(outside.parent)
    with suppress(OSError, ValueError):
        publish_folder(tmp_path / "step", lambda folder: (folder / "file").write_text("x"))
    assert os.listdir(outside.parent) == ["id_rsa"] and outside.read_text() == SECRET


def test_old_checkpoints_are_removed_and_not_what_links_lead_to(tmp_path, outside):
    store = CheckpointStore(tmp_path / "ACTOR", 1, print)
    (tmp_path / "ACTOR").mkdir()
    (tmp_path / "ACTOR" / "step-000001").symlink_to(outside.parent)
    with suppress(OSError, ValueError):
        store.publish(2, lambda folder: (folder / "file").write_text("x"))
    assert os.listdir(outside.parent) == ["id_rsa"]


# ----- what is read of checkpoints and records


def listing(folder, name: str, path=None) -> None:
    described = {"bytes": 0, "sha256": "0" * 64}
    (folder / CONTENTS).write_text(json.dumps({name: described}))


@pytest.mark.parametrize("name", ["../outside/id_rsa", "/etc/passwd", "/dev/zero", "/dev/stdin"])
def test_a_list_of_contents_names_files_of_its_folder(tmp_path, outside, name):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    listing(folder, name)
    assert "is not in the folder" in why_invalid(folder)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/random", "/etc/passwd"])
def test_a_link_in_a_checkpoint_is_not_followed(tmp_path, target):
    folder = tmp_path / "step-000001"
    folder.mkdir()
    (folder / "weights").symlink_to(target)
    listing(folder, "weights")
    assert "is not in the folder" in why_invalid(folder)


def test_a_pipe_in_a_checkpoint_is_no_file(tmp_path):
    """Whoever opened it would wait for ever."""
    os.mkfifo(tmp_path / "weights")
    listing(tmp_path, "weights")
    assert "is no file" in why_invalid(tmp_path)
    os.mkfifo(tmp_path / "model.safetensors")
    assert "is no file" in damage(tmp_path / "model.safetensors")


@pytest.mark.parametrize("place", ["../../outside", "/etc", "checkpoints"])
def test_a_manifest_names_results_of_its_folder(tmp_path, place):
    stages = {"ACTOR": {"status": "done", "output": place, "metrics": {}}}
    (tmp_path / FILE_NAME).write_text(json.dumps({"stages": stages}))
    assert "no record of a run" in line_about(lambda: Manifest.open(tmp_path, resume=True))


@pytest.mark.parametrize("moving", [{"ACTOR": "../../outside"}, {"ACTOR": "/tmp"}, {"../x": "ACTOR-1"}])
def test_a_manifest_moves_nothing_elsewhere(tmp_path, moving):
    (tmp_path / FILE_NAME).write_text(json.dumps({"stages": {}, "moving": moving}))
    assert "no record of a run" in line_about(lambda: Manifest.open(tmp_path, resume=True))


# ----- who may read what people said


def permissions(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_conversations_are_their_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        log = RunLog(tmp_path)
        log.samples("RL", 1, [{"prompt": "hello", "completion": "well"}])
        log.step("RL", 1, {"reward/mean": 1.0})
        with Journal(tmp_path / "rows.journal.jsonl") as journal:
            journal.add("key", Reply("well"))
        output = Output(tmp_path / "rows.json")
        with output.held() as publication:
            output.write(publication, [{"user_input": "a"}], [{"reply": "b"}], {})
        SkippedSteps("ACTOR", tmp_path, 9, print, "").skip(7, "it is not finite", None, [{"row": 1, "text": "hello"}])
        assert permissions(tmp_path / "metrics.jsonl") == 0o644
        for name in ("samples.jsonl", "rows.journal.jsonl", "rows.quarantine.jsonl", "skipped/step-000007.json"):
            assert permissions(tmp_path / name) == 0o600, name
        log.rewind("RL", 0)
        assert permissions(tmp_path / "samples.jsonl") == 0o600
    finally:
        os.umask(before)
