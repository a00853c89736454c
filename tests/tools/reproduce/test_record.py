"""What a manifest says of how to repeat a run, and what cannot be repeated."""

from __future__ import annotations

import json

import pytest
from reproduce_run import claim
from small_run import settings

from chatrlhf import cli, load_config
from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.manifest import FILE_NAME, Manifest
from chatrlhf.runtime.provenance import code, commit_of, hardware, versions
from chatrlhf.tools.reproduce import sameness
from chatrlhf.tools.reproduce.record import read_record
from chatrlhf.tools.reproduce.sameness import content_differences, environment_differences, setting_differences


def config_of(files, **changes):
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    return load_config(settings(files), {"output_dir": str(files / "run")} | keys)


def differences(run_dir, *words):
    return content_differences(read_record(run_dir, run_dir.with_name("new"), words), print)


def test_each_call_is_recorded_with_its_settings_and_what_computed(files, claimed):
    call = Manifest.open(claimed, resume=False).calls["1"]
    assert call["asked"] == ["ACTOR"] and call["config"]["seed"] == 5 and call["reward_given"] is None
    assert call["code"] == code() and call["versions"] == versions() and call["hardware"] == hardware(1)
    claim(claimed, config_of(files, trainer_config__lam=0.9), "RL", finish=False)
    manifest = Manifest.open(claimed, resume=False)
    assert [manifest.stages[stage]["calls"] for stage in ("ACTOR", "RL")] == [["1"], ["2"]]


def test_calls_that_have_left_nothing_are_forgotten(files, claimed):
    config = config_of(files)
    for _ in range(3):
        Manifest.open(claimed, resume=False).begin(config, ["RL"])
    assert list(Manifest.open(claimed, resume=False).calls) == ["1", "4"]


def test_a_stage_is_repeated_with_the_settings_of_its_call(files, claimed):
    claim(claimed, config_of(files, trainer_config__lam=0.9), "RL")
    record = read_record(claimed, files / "new")
    assert [rerun.stage for rerun in record.reruns] == ["ACTOR", "RL"]
    assert [rerun.config.trainer_config.lam for rerun in record.reruns] == [0.95, 0.9]
    assert {rerun.config.run_dir for rerun in record.reruns} == {files / "new"}


def test_stages_are_launched_as_they_were_asked_for(files, claimed):
    config = config_of(files, reward_config__reward_fn="small_run:length")

    def launches():
        record = read_record(claimed, files / "new")
        return [(launch.type, launch.resume, launch.rerun.number) for launch in record.launches]

    claim(claimed, config, "RL")
    assert launches() == [("ACTOR", False, "1"), ("RL", False, "2")]
    stored = json.loads((claimed / FILE_NAME).read_text())
    stored["calls"]["2"]["asked"] = ["ACTOR", "REWARD", "RL"]  # with --resume, since ACTOR is the first call's
    (claimed / FILE_NAME).write_text(json.dumps(stored))
    assert launches() == [("ACTOR", False, "1"), ("ALL", True, "2")]
    stored["stages"]["ACTOR"]["calls"] = ["2"]
    (claimed / FILE_NAME).write_text(json.dumps(stored))
    assert launches() == [("ALL", False, "2")]
    stored["stages"]["RL"]["status"] = "begun"
    (claimed / FILE_NAME).write_text(json.dumps(stored))
    assert launches() == [("ACTOR", False, "2")]


def test_nothing_of_trackers_is_repeated(files):
    claim(files / "run", config_of(files, trackers=["tensorboard"]))
    assert read_record(files / "run", files / "new").reruns[0].config.trackers == []


def test_what_cannot_be_repeated_is_said(files, claimed):
    with pytest.raises(CheckpointError, match="no run is here"):
        read_record(files, files / "new")
    claim(files / "begun", config_of(files), finish=False)
    with pytest.raises(CheckpointError, match="no stage is finished"):
        read_record(files / "begun", files / "new")
    stored = json.loads((claimed / FILE_NAME).read_text())
    del stored["stages"]["ACTOR"]["calls"]
    (claimed / FILE_NAME).write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="did not record its calls"):
        read_record(claimed, files / "new")


def test_a_reward_function_of_python_code_cannot_be_repeated(files):
    claim(files / "run", config_of(files), "RL", reward="mine")
    with pytest.raises(CheckpointError, match="the reward function mine of RL was given in Python"):
        read_record(files / "run", files / "new")


def test_credentials_that_a_manifest_hides_have_to_be_given_again(files):
    url = "https://me:hunter22@127.0.0.1:9/score?token=abcdefgh"
    claim(files / "run", config_of(files, reward_config__reward_fn=url), "RL")
    assert "hunter22" not in (files / "run" / FILE_NAME).read_text()
    with pytest.raises(CheckpointError, match="credentials in reward_config.reward_fn are not kept"):
        read_record(files / "run", files / "new")
    (rerun,) = read_record(files / "run", files / "new", [f"reward_config.reward_fn={url}"]).reruns
    assert rerun.config.reward_config.reward_fn == url
    recorded = {"settings": {"reward_config.reward_fn": "https://***@127.0.0.1:9/score?token=***"}}
    assert setting_differences(rerun, recorded) == []


def test_a_stage_that_was_continued_unchanged_can_be_repeated_and_one_that_was_changed_not(files):
    def resume(**changes):
        manifest = Manifest.open(files / "run", resume=True)
        manifest.begin(config_of(files, **changes), ["ACTOR"])
        manifest.start("ACTOR", manifest.stages["ACTOR"]["made_from"], {})
        manifest.finish("ACTOR", {"model": "tiny", "output": "actor", "metrics": {}})

    claim(files / "run", config_of(files), finish=False)
    resume(trainer_config__lam=0.5)  # which ACTOR does not read
    assert read_record(files / "run", files / "new").reruns[0].call["config"]["trainer_config"]["lam"] == 0.5
    resume(actor_config__epochs=2)
    with pytest.raises(CheckpointError, match=r"continued by --resume with other settings \(actor_config.epochs\)"):
        read_record(files / "run", files / "new")


def test_what_is_not_finished_is_left_out(files, claimed):
    claim(claimed, config_of(files), "RL", finish=False)
    record = read_record(claimed, files / "new")
    assert [rerun.stage for rerun in record.reruns] == ["ACTOR"]
    assert record.notes == ["RL is not finished and is left out"]


def test_the_same_files_are_no_difference_wherever_they_are(files, claimed):
    assert differences(claimed) == []
    (files / "actor.json").rename(files / "moved.json")
    assert any("actor.json" in line for line in differences(claimed))
    assert differences(claimed, f"actor_config.train_dataset_path={files / 'moved.json'}") == []


def test_a_changed_file_is_named_and_nothing_is_trained(files, claimed, capsys):
    rows = json.loads((files / "actor.json").read_text())
    rows[0]["completion"] += "!"
    (files / "actor.json").write_text(json.dumps(rows))
    assert cli.main(["reproduce", str(claimed)]) == 2
    shown = capsys.readouterr().out
    assert f"differs: ACTOR data: {files / 'actor.json'} is not the file it was" in shown
    assert not (files / "run-reproduced").exists()


def test_another_template_is_named(files, claimed):
    (line,) = differences(claimed, "actor_config.template=raw")
    assert line == "ACTOR, actor_config.template: chatllama has another content than it had"


def test_nothing_is_written_over_what_is_there(files, claimed, capsys):
    (files / "mine").mkdir()
    (files / "mine" / "notes.txt").write_text("mine")
    assert cli.main(["reproduce", str(claimed), "--into", str(files / "mine")]) == 2
    assert "nothing is written over it" in capsys.readouterr().err


def test_other_code_packages_and_hardware_are_told(claimed, monkeypatch):
    call = Manifest.open(claimed, resume=False).calls["1"]
    assert environment_differences(call, 1) == []
    monkeypatch.setattr(sameness, "versions", lambda: versions() | {"torch": "9.0"})
    monkeypatch.setattr(sameness, "hardware", lambda threads: hardware(threads) | {"gpu": "H100", "system": "other"})
    monkeypatch.setattr(sameness, "code", lambda: {"sha256": "f" * 64, "commit": None})
    code_line, torch_line, gpu_line = environment_differences(call, 1)
    assert code_line.endswith("-> sources ffffffffffff") and torch_line.endswith("-> 9.0")
    assert gpu_line == "hardware, gpu: none -> H100"


def test_settings_that_would_be_others_are_told(files, claimed):
    (rerun,) = read_record(claimed, files / "new", ["seed=6"]).reruns
    assert setting_differences(rerun, {"settings": {"seed": 5, "actor_config.epochs": 1}}) == ["seed: 5 -> 6"]


def test_the_commit_of_a_checkout_is_read_from_its_files(tmp_path):
    assert commit_of(tmp_path) is None
    git = tmp_path / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "packed-refs").write_text("# pack-refs\nabc123 refs/heads/main\n")
    assert commit_of(tmp_path) == "abc123"
    (git / "refs" / "heads" / "main").write_text("def456\n")
    assert commit_of(tmp_path) == "def456"
    further = tmp_path / "further"
    (git / "worktrees" / "further").mkdir(parents=True)
    further.mkdir()
    (further / ".git").write_text(f"gitdir: {git / 'worktrees' / 'further'}\n")
    (git / "worktrees" / "further" / "commondir").write_text("../..\n")
    (git / "worktrees" / "further" / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(further) == "def456"
    (git / "worktrees" / "further" / "HEAD").write_text("789abc\n")
    assert commit_of(further) == "789abc"


@pytest.mark.parametrize("calls", [["1"], {"1": "call"}, {"one": {}}], ids=["a list", "no record", "no number"])
def test_a_manifest_with_malformed_calls_is_refused(claimed, calls):
    stored = json.loads((claimed / FILE_NAME).read_text())
    (claimed / FILE_NAME).write_text(json.dumps(stored | {"calls": calls}))
    with pytest.raises(CheckpointError, match="no record of a run"):
        Manifest.open(claimed, resume=True)
