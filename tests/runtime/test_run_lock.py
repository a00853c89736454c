"""One process at a time writes into a run's folder, and what a second run sets aside is whole or still in its place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chatrlhf import load_config, run
from chatrlhf.errors import LockedError
from chatrlhf.runtime import fault_points, run_lock
from chatrlhf.runtime.manifest import Manifest
from chatrlhf.runtime.run_lock import LOCK, RunLock
from chatrlhf.stages.context import RunContext

HOLDS = """
import sys, time
from pathlib import Path
from chatrlhf.runtime.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_it_until_that_is_gone(tmp_path, holder):
    lock = RunLock(tmp_path)
    with pytest.raises(
        LockedError, match=rf"{tmp_path} is in use by process {holder.pid} on \S+ since 20.*; wait until"
    ):
        lock.acquire()
    assert not lock.is_held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    lock.acquire()  # what the killed one left is no hindrance
    assert lock.is_held
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_whole_run_is_refused_before_it_reads_anything(tmp_path, holder):
    config = load_config({"output_dir": str(tmp_path), "actor_config": {"train_dataset_path": "nowhere.json"}})
    with pytest.raises(LockedError, match="is in use by process"):
        run(config, type="ACTOR")
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_it_ends_with_a_run_that_fails(tmp_path):
    config = load_config({"output_dir": str(tmp_path), "actor_config": {"train_dataset_path": "nowhere.json"}})
    for _ in range(2):
        with pytest.raises(Exception, match=r"nowhere\.json"):
            run(config, type="ACTOR")
    assert list(tmp_path.iterdir()) == []


def test_two_locks_of_one_process_are_two(tmp_path):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire()
    first.acquire()
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        second.acquire()
    first.release()
    second.acquire()
    second.release()


def test_a_child_that_outlives_its_parent_holds_nothing(tmp_path):
    # The child says who it is: by then it has let the lock go.
    code = HOLDS.replace('print("held"', "import os\nif os.fork(): time.sleep(60)\nprint(os.getpid()")
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    lock = RunLock(tmp_path)
    lock.acquire()
    lock.release()
    os.kill(child, signal.SIGKILL)


def said_by(host: str, pid: int, boot: str | None = None) -> str:
    own = run_lock._this_process()
    return json.dumps(own | {"host": host or own["host"], "pid": pid, "boot": own["boot"] if boot is None else boot})


@pytest.mark.parametrize(
    "content, held",
    [
        ("", None),
        ("{", None),
        ("[1]", None),
        (said_by("", 1), "is in use by process 1 on"),
        (said_by("", 2**22 + 1), None),  # beyond the largest process id
        (said_by("", 1, boot="another"), None),
        (said_by("elsewhere", 1), "process 1 on elsewhere .*; if that process is gone, remove"),
    ],
    ids=["empty", "half", "a list", "alive", "gone", "of another boot", "of another host"],  # the same in each worker
)
def test_without_locks_of_the_file_system_the_file_itself_is_believed(tmp_path, monkeypatch, content, held):
    monkeypatch.setattr(run_lock, "_lock", lambda file: False)
    (tmp_path / LOCK).write_text(content)
    lock = RunLock(tmp_path)
    if held:
        with pytest.raises(LockedError, match=held):
            lock.acquire()
        assert (tmp_path / LOCK).read_text() == content
    else:
        lock.acquire()
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def first_run(folder: Path) -> Manifest:
    """A folder in which all stages have ended."""
    manifest = Manifest(folder)
    for stage, output in (("ACTOR", "actor"), ("REWARD", "reward"), ("RL", "actor_rl")):
        (folder / output).mkdir()
        (folder / output / "weights").write_text(stage)
        (folder / "checkpoints" / stage / "step-000001").mkdir(parents=True)
        manifest.stages[stage] = {"status": "done", "output": output, "metrics": {}}
    (folder / "metrics.jsonl").write_text("{}\n")
    manifest._save()
    return Manifest.open(folder, resume=False)


def assert_all_aside(folder: Path) -> None:
    for stage, output in (("ACTOR", "actor"), ("REWARD", "reward"), ("RL", "actor_rl")):
        place = folder / "previous" / f"{stage}-1"
        assert sorted(path.name for path in place.iterdir()) == sorted(
            [output, stage, "manifest.json", "metrics.jsonl"]
        )
        assert (place / output / "weights").read_text() == stage
        assert json.loads((place / "manifest.json").read_text())["stages"].keys() == {"ACTOR", "REWARD", "RL"}
    assert sorted(path.name for path in (folder / "previous").iterdir()) == ["ACTOR-1", "REWARD-1", "RL-1"]


def test_all_that_is_made_anew_is_set_aside_at_once(tmp_path):
    said: list[str] = []
    first_run(tmp_path).set_aside(["ACTOR", "REWARD", "RL"], said.append)
    assert_all_aside(tmp_path)
    assert len(said) == 3 and "RL: results of an earlier run were moved to" in said[2]
    assert Manifest.open(tmp_path, resume=True).stages == {}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_killed_while_it_sets_aside_the_next_one_finishes(tmp_path, moved):
    manifest = first_run(tmp_path)

    def die(place: Path) -> None:
        raise Killed

    end = fault_points.at("manifest.set_aside", die, call=moved)
    with pytest.raises(Killed):
        manifest.set_aside(["ACTOR", "REWARD", "RL"], print)
    end()
    again = Manifest.open(tmp_path, resume=True)
    assert again.stages == {}  # nothing of the first run is taken for the second's
    again.finish_moves()
    assert_all_aside(tmp_path)
    assert not any(again.has_begun(stage) for stage in ("ACTOR", "REWARD", "RL"))
    assert "moving" not in json.loads((tmp_path / "manifest.json").read_text())


def test_a_run_that_does_not_resume_finishes_the_moves_before_it_reads(tmp_path):
    """And what the manifest knows besides is kept where that run then fails."""
    manifest = first_run(tmp_path)
    manifest.facts["day"] = "2026-01-02"
    end = fault_points.at("manifest.set_aside", lambda place: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        manifest.set_aside(["ACTOR", "REWARD", "RL"], print)
    end()
    config = load_config({"output_dir": str(tmp_path), "actor_config": {"train_dataset_path": "nowhere.json"}})
    with pytest.raises(Exception, match=r"nowhere\.json"):
        run(config, type="ACTOR")
    assert_all_aside(tmp_path)
    assert Manifest.open(tmp_path, resume=True).facts == {"day": "2026-01-02"}


def test_what_a_section_starts_from_keeps_its_place_until_it_is_read(tmp_path):
    config = load_config({"output_dir": str(tmp_path), "reward_config": {"model": str(tmp_path / "reward")}})
    ctx = RunContext(config, None, None, Manifest(tmp_path), None, None, False, ["ACTOR", "REWARD", "RL"])
    assert ctx._made_anew("ACTOR") == ["ACTOR", "RL"] and ctx._made_anew("REWARD") == ["REWARD", "RL"]


def test_killed_before_anything_is_moved_nothing_has_happened(tmp_path, monkeypatch):
    manifest = first_run(tmp_path)
    monkeypatch.setattr(Manifest, "_save", lambda self, **extra: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        manifest.set_aside(["ACTOR"], print)
    monkeypatch.undo()
    again = Manifest.open(tmp_path, resume=True)
    assert again.is_done("ACTOR") and (tmp_path / "actor" / "weights").exists()
    again.set_aside(["ACTOR", "REWARD", "RL"], print)
    assert_all_aside(tmp_path)


def test_a_folder_that_changed_before_it_was_locked_is_refused(tmp_path):
    manifest = Manifest.open(tmp_path, resume=False)
    manifest.refuse_changes()
    first_run(tmp_path)
    with pytest.raises(LockedError, match="another run has written into"):
        manifest.refuse_changes()
