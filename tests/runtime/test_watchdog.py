"""Where nothing moves it is said once, with phase, process and stacks; and the process ends where that is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_run import ROOT

from chatrlhf.runtime import watchdog
from chatrlhf.runtime.watchdog import beat, watched


def wait_for_the_thing_that_never_comes() -> None:
    time.sleep(0.5)


def test_a_silence_is_said_once_with_phase_and_stacks(tmp_path, capfd):
    with watched(tmp_path, (0.1, None), rank=3):
        beat("RL step 7: rewards")
        wait_for_the_thing_that_never_comes()
    err = capfd.readouterr().err
    assert err.count("warning") == 1
    assert f"process {os.getpid()} (rank 3): nothing has moved for 0 s, since: RL step 7: rewards; the run waits" in err
    stacks = (tmp_path / "stacks-rank3.txt").read_text()
    assert "RL step 7: rewards" in stacks and "in wait_for_the_thing_that_never_comes" in stacks


def test_each_silence_is_said(tmp_path, capfd):
    with watched(tmp_path, (0.1, None), rank=0):
        for phase in ("rollout", "update"):
            beat(phase)
            time.sleep(0.4)
    err = capfd.readouterr().err
    assert err.count("warning") == 2 and "since: rollout" in err and "since: update" in err


def test_while_something_moves_nothing_is_said(tmp_path, capfd):
    with watched(tmp_path, (0.3, 0.4), rank=0):
        for _ in range(40):
            beat("update")
            time.sleep(0.02)
    assert capfd.readouterr().err == "" and not list(tmp_path.iterdir())


def test_it_is_off_where_there_is_no_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog.threading, "Thread", lambda **_: pytest.fail("a thread"))
    with watched(tmp_path, (None, None), rank=0):
        pass


def test_it_ends_a_process_that_hangs(tmp_path):
    code = (
        "import time\nfrom pathlib import Path\nfrom chatrlhf.runtime.watchdog import beat, watched\n"
        f"with watched(Path({str(tmp_path)!r}), (None, 0.2), 0):\n    beat('rollout')\n    time.sleep(30)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=20)
    assert done.returncode == 1
    assert "since: rollout; the run ends (guards_config.silence); --resume continues" in done.stderr
    assert (tmp_path / "stacks-rank0.txt").exists()


def test_a_folder_that_cannot_be_written_to_does_not_silence_it(tmp_path, capfd):
    with watched(Path(tmp_path / "missing"), (0.1, None), rank=0):
        time.sleep(0.4)
    assert "nothing has moved" in capfd.readouterr().err
