"""Killed before any of its file-system calls, a command that writes several files can simply be run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from chatrlhf.data.download import download
from chatrlhf.data.files import write_rows
from chatrlhf.errors import DataError, LockedError, UserError
from chatrlhf.runtime.atomic_files import replace_file
from chatrlhf.runtime.bundled_files import copy_artifacts
from chatrlhf.runtime.publication import PUBLISHING, Publication
from chatrlhf.runtime.run_lock import RunLock, lock_beside
from chatrlhf.samples import make_data
from chatrlhf.tools.synth.output import Output

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
FINISHED, FAILED, MOST_CALLS = 0, 3, 5000
Command = Callable[[Path], object]


def hh(folder: Path) -> Path:
    (folder / "harmless-base").mkdir(parents=True)
    rows = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: yes {i}", "rejected": f"\n\nHuman: {i}?\n\nAssistant: no {i}"}
        for i in range(5)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "harmless-base" / "train.jsonl").write_text(text)
    return folder


def synthesize(folder: Path) -> None:
    output = Output(folder / "rows.json")
    with output.held() as publication:
        output.check(False, publication)
        output.write(publication, [{"user_input": "a"}], [{"reply": "b"}], {"complete": True})


@pytest.fixture
def commands(tmp_path, monkeypatch) -> dict[str, Command]:
    source = hh(tmp_path / "source")
    names = ("actor_training_data.json", "reward_training_data.json", "rlhf_training_data.json")
    few = {name: [{"user_input": name}] for name in names}
    monkeypatch.setattr(make_data, "make_datasets", lambda seed: few)
    return {
        "download": lambda folder: download("ARLHF", folder, 5, source_dir=source),
        "make_data": lambda folder: make_data.write_datasets(folder, 0),
        "synth": synthesize,
        "init": copy_artifacts,
    }


def killed_at(number: int, command: Command, folder: Path) -> int:
    """Run a command in a process of its own that is killed before its ``number``-th change of the file system; returns
    its status: FINISHED where it makes fewer, -SIGKILL where it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = 0

    def look(event: str, args: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES or writes:
            changes += 1
            if changes == number:
                os.kill(os.getpid(), signal.SIGKILL)

    status = FAILED
    try:
        sys.addaudithook(look)
        command(folder)
        status = FINISHED
    finally:
        os._exit(status)


def left(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_everywhere(command: Command, tmp_path: Path, step: int) -> int:
    """Kill a command before every ``step``-th change, twice in a row, and run it again; returns how often."""
    whole = tmp_path / "whole"
    command(whole)
    expected = left(whole)
    assert len(expected) >= 3 and not any(name.startswith(".") for name in expected)
    for kills, number in enumerate(range(1, MOST_CALLS, step)):
        folder = tmp_path / f"killed-{number}"
        status = killed_at(number, command, folder)
        if status == FINISHED:
            assert kills and left(folder) == expected
            return kills
        assert status == -signal.SIGKILL, f"the command has failed by itself ({number})"
        killed_at(max(number // 2, 1), command, folder)  # its second try is killed, too
        before = left(folder) if folder.exists() else {}
        is_complete = expected.items() <= before.items() and not any(PUBLISHING in name for name in before)
        try:
            command(folder)
        except UserError as error:  # the kill came when all had been done
            assert is_complete and ("is there already" in str(error) or "refused to overwrite" in str(error))
        assert left(folder) == expected, f"killed before change {number}"
    raise AssertionError("the command never came to its end")


@pytest.mark.parametrize("name, step", [("download", 5), ("make_data", 5), ("synth", 5), ("init", 131)])
def test_killed_and_run_again(commands, tmp_path, name, step):
    assert kill_everywhere(commands[name], tmp_path, step) >= 3


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("name", ["download", "make_data", "synth", "init"])
def test_killed_before_each_change_and_run_again(commands, tmp_path, name):
    assert kill_everywhere(commands[name], tmp_path, 1) >= 20


def two(folder: Path, text: str = "new") -> None:
    with Publication(folder, "two", "--path") as publication:
        files = {folder / name: lambda path: replace_file(path, text) for name in ("a", "b")}
        if there := publication.in_the_way(files):
            raise DataError(f"{there[0]} is there already")
        publication.publish(files)


def killed_between_two_moves(folder: Path) -> None:
    """The record is there, `a` has its place and `b` has not."""
    number = 1
    while not ((folder / f"{PUBLISHING}two").exists() and (folder / "a").exists() and not (folder / "b").exists()):
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        assert killed_at(number, two, folder) != FINISHED
        number += 1


def test_a_file_that_a_user_has_put_there_since_is_not_overwritten(tmp_path):
    folder = tmp_path / "mine"
    killed_between_two_moves(folder)
    (folder / "b").write_text("mine")
    with pytest.raises(DataError, match=r"b was changed after a call of this command was killed.*move the file away"):
        two(folder)
    assert (folder / "b").read_text() == "mine"
    (folder / "b").unlink()
    two(folder)
    assert left(folder) == {"a": b"new", "b": b"new"}


def test_a_file_of_the_killed_call_that_was_changed_since_is_the_users(tmp_path):
    folder = tmp_path / "mine"
    killed_between_two_moves(folder)
    (folder / "a").write_text("mine")
    with pytest.raises(DataError, match="a is there already"):
        two(folder)
    assert (folder / "a").read_text() == "mine"


def test_what_fails_leaves_nothing(tmp_path):
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    folder = tmp_path / "new" / "deep"
    with (
        pytest.raises(DataError, match=r"deep: it cannot be written \(.*No space left.*; give another --path"),
        Publication(folder, "two", "--path") as publication,
    ):
        publication.publish({folder / "a": lambda path: replace_file(path, "x"), folder / "b": full})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"from": "/tmp", "moves": {}}', '{"from": ".writing-x", "moves": []}'])
def test_a_record_that_is_none_of_ours_is_named(tmp_path, text):
    (tmp_path / f"{PUBLISHING}two").write_text(text)
    with pytest.raises(DataError, match="this is no record of files to be moved; remove it"):
        two(tmp_path)


def test_a_record_moves_nothing_out_of_its_folder(tmp_path):
    folder = tmp_path / "data"
    (folder / ".writing-two-1").mkdir(parents=True)
    moves = {"../b": {"sha256": "", "replaces": None}}
    (folder / f"{PUBLISHING}two").write_text(json.dumps({"from": ".writing-two-1", "moves": moves}))
    with pytest.raises(DataError, match="no record"):
        two(folder)


# ----- locks


@pytest.mark.parametrize("name", ["download", "make_data", "init"])
def test_a_command_is_told_who_writes_into_its_folder(commands, tmp_path, name):
    folder = tmp_path / "out"
    folder.mkdir()
    with (
        RunLock(folder),
        pytest.raises(LockedError, match=rf"out is in use by process {os.getpid()} on \S+ since 20.*another folder"),
    ):
        commands[name](folder)
    assert list(folder.iterdir()) == []


def test_a_generating_script_locks_its_own_file_alone(tmp_path):
    with lock_beside(tmp_path / "rows.json", "--output"):
        with pytest.raises(LockedError, match=r"^--output: \S+rows.json is in use by process .*name another file"):
            synthesize(tmp_path)
        with Output(tmp_path / "other.json").held() as publication:
            publication.publish({tmp_path / "other.json": lambda path: write_rows(path, [])})
    assert [path.name for path in tmp_path.iterdir()] == ["other.json"]


def test_first_starts_at_the_same_moment_do_not_disturb_each_other(tmp_path):
    """Each makes the missing part of the path in order to try it, and removes it again."""
    from chatrlhf.runtime.output_dir import _try_to_write

    children = []
    start = time.time() + 0.05
    for _ in range(6):
        child = os.fork()
        if not child:
            status = FAILED
            try:
                while time.time() < start:
                    pass
                for _ in range(100):
                    _try_to_write(tmp_path / "a" / "b" / "c")
                status = FINISHED
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
