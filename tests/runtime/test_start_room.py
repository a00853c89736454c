"""Room, files and limits that a run needs are asked for before anything is loaded."""

from __future__ import annotations

import os
import resource
import subprocess
from collections import namedtuple

import pytest
from small_run import write_config, write_files

from chatrlhf.cli import main
from chatrlhf.errors import ConfigError
from chatrlhf.runtime import start_room

WEIGHTS = {"ACTOR": 1_000_000, "RL": 1_000_000}


def check(folder, is_sharded=False):
    start_room.check_start(folder / "not" / "there", "output_dir", WEIGHTS, is_sharded)


def test_bytes(tmp_path, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(start_room.shutil, "disk_usage", lambda _: usage(24 * 10**6))
    with pytest.raises(ConfigError, match="has 0.024 GB free.*ACTOR and RL need at least 0.0241 GB; make room"):
        check(tmp_path)
    monkeypatch.setattr(start_room.shutil, "disk_usage", lambda _: usage(25 * 10**6))
    check(tmp_path)


def test_files(tmp_path, monkeypatch):
    system = namedtuple("System", "f_files f_favail f_bavail f_blocks f_bfree f_frsize", defaults=(10**9,) * 4)
    monkeypatch.setattr(start_room.os, "statvfs", lambda _: system(100, 39))
    with pytest.raises(ConfigError, match=r"39 more files \(inodes\), and ACTOR and RL write at least 40"):
        check(tmp_path)
    for each in (system(100, 40), system(0, 0)):
        monkeypatch.setattr(start_room.os, "statvfs", lambda _, each=each: each)
        check(tmp_path)


def test_the_limit_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (7_000_000, resource.RLIM_INFINITY))
    with pytest.raises(ConfigError, match="at most 0.007 GB, and ACTOR and RL write one of at least 0.008 GB"):
        check(tmp_path)
    check(tmp_path, is_sharded=True)


@pytest.mark.slow
@pytest.mark.parametrize("options, says", [("size=64k", "GB free"), ("nr_inodes=9", "more files (inodes)"), ("ro", "")])
def test_a_small_disk_is_one_line_and_nothing_is_left(options, says, tmp_path, capsys):
    """On a file system of its own, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        write_files(tmp_path)
        assert main([str(write_config(tmp_path)), "--output-dir", str(disk / "run")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: output_dir") and said.count("\n") == 1 and says in said, said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
