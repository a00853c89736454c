"""A disk that fills up: said with the file and what to do, and `--resume` continues once there is room."""

from __future__ import annotations

import resource
from collections import namedtuple
from contextlib import contextmanager
from pathlib import Path

import pytest
from field_reports import report
from small_run import differences, left_behind, write_config, write_files
from torch import nn

from chatrlhf.cli import main
from chatrlhf.errors import UserError
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.runtime import disk_space
from chatrlhf.runtime.atomic_files import why_invalid
from chatrlhf.stages.hf_trainer import StageCallback

pytestmark = pytest.mark.slow

LARGEST = 40_000  # bytes of a file: the traceback's log has room, weights and optimizer states have none


@contextmanager
def full_from(monkeypatch, owner: type, method: str, call: int):
    """From a call of a method on no large file can be written, as on a full disk."""
    original, calls, before = getattr(owner, method), [0], resource.getrlimit(resource.RLIMIT_FSIZE)

    def patched(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, before[1]))
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, patched)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


@report(
    "hiyouga/LlamaFactory#5155",
    fault="the disk fills up while a checkpoint is written: a traceback, half a checkpoint",
    expected="one line with folder and remedy, the checkpoint before stays valid, --resume ends with the same bytes",
)
@pytest.mark.parametrize(
    "stage, owner, method, call",
    # The first checkpoints are written at steps 3 and 2, the next at 6 and 4.
    [("ACTOR", StageCallback, "on_step_end", 4), ("RL", PPOTrainer, "_record", 3)],
)
def test_a_disk_that_fills_up(stage, owner, method, call, tmp_path, one_thread, monkeypatch, capsys):
    write_files(tmp_path)
    words = [str(write_config(tmp_path)), "--type", stage, "--set", "reward_config.reward_fn=small_run:length"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*words, "--output-dir", str(whole)]) == 0
    capsys.readouterr()
    with full_from(monkeypatch, owner, method, call):
        assert main([*words, "--output-dir", str(cut)]) == 2
    said = capsys.readouterr().err
    checkpoints = cut / "checkpoints" / stage
    (log,) = cut.glob("error-*.log")
    assert said.count("\n") == 1 and str(checkpoints) in said and "--resume" in said and str(log) in said
    assert "Traceback" in log.read_text()
    (kept,) = checkpoints.iterdir()  # and no half of a new one
    assert why_invalid(kept) is None
    assert main([*words, "--output-dir", str(cut), "--resume"]) == 0
    for run_dir in (whole, cut):
        (run_dir / "samples.jsonl").touch()  # RL's alone
    assert differences(left_behind(whole), left_behind(cut)) == []


@report(
    "bghira/SimpleTuner#2353",
    fault="output_dir is a file, lies below one, is the model's folder: a traceback, or training to no end",
    expected="one line that names output_dir, before anything is read",
)
@pytest.mark.parametrize("place", ["a.txt", "a.txt/run", "/proc/none", "~nobody_at_all/x", "x" * 300, "base"])
def test_an_output_dir_that_cannot_be(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("mine")
    Path("base").mkdir()
    Path("c.yaml").write_text("actor_config: {model: base, train_dataset_path: nowhere.json}")
    assert main(["c.yaml", "--type", "ACTOR", "--output-dir", place]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: output_dir") and said.count("\n") == 1, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "base", "c.yaml"]


@pytest.mark.parametrize("name, is_folder", [("checkpoints", False), ("previous", False), ("metrics.jsonl", True)])
def test_what_is_in_the_way_in_it(name, is_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run", name).mkdir() if is_folder else Path("run", name).write_text("mine")
    Path("c.yaml").write_text("actor_config: {train_dataset_path: nowhere.json}")
    assert main(["c.yaml", "--type", "ACTOR", "--output-dir", "run"]) == 2
    assert f"error: output_dir: run/{name} is in the way" in capsys.readouterr().err


def test_folders_made_to_try_are_removed_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("actor_config: {train_dataset_path: nowhere.json}")
    assert main(["c.yaml", "--type", "ACTOR", "--output-dir", "a/b/c"]) == 2
    assert "nowhere.json" in capsys.readouterr().err and not Path("a").exists()


def test_room_is_counted_before_training(tmp_path, monkeypatch):
    model, said = nn.Linear(100, 10, bias=False), []  # 4 kB of weights, 8 kB of Adam's moments
    free = namedtuple("Usage", "free")
    for room, refused, warned in ((15_000, True, False), (17_000, False, True), (41_000, False, False)):
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _, room=room: free(room))
        said.clear()
        if refused:
            with pytest.raises(UserError, match="needs at least 1.6e-05 GB; make room"):
                disk_space.check_room(tmp_path, "ACTOR", model, 2, False, said.append)
            disk_space.check_room(tmp_path, "ACTOR", model, 2, True, said.append)  # some of it is there already
        else:
            disk_space.check_room(tmp_path, "ACTOR", model, 2, False, said.append)
            assert bool(said) == warned
    model.requires_grad_(False)
    disk_space.check_room(tmp_path, "ACTOR", model, 2, False, said.append)
    assert said == []
