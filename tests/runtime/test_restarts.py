"""A run that crashed is started again; one that ended by itself, or was asked to, is not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from chatrlhf.runtime import restarts
from chatrlhf.runtime.restarts import supervise
from chatrlhf.tools.arguments import duration

# Notes each start's words, writes the record once, and ends as the next line of the plan says.
PROGRAM = """
import os, sys
from pathlib import Path
folder = Path(sys.argv[1])
starts = folder / "starts"
number = len(starts.read_text().splitlines()) if starts.exists() else 0
with starts.open("a") as file:
    print(*sys.argv[2:], file=file)
(folder / "record").write_text(os.environ.get("RECORD", "begun"))
ending = int((folder / "plan").read_text().split()[number])
if ending < 0:
    os.kill(os.getpid(), -ending)
raise SystemExit(ending)
"""

pytestmark = pytest.mark.usefixtures("signals_arrive")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(restarts, "LONGEST_PAUSE", 0.0)


def supervised(folder: Path, plan: str, restarts: int = 3, time_limit: float | None = None) -> tuple[int, list[str]]:
    """Exit status, and the words of each start."""
    (folder / "plan").write_text(plan)

    def command(resume: bool, left: float | None) -> list[str]:
        return ["-c", PROGRAM, str(folder), "--resume" if resume else "anew", *([] if left is None else [f"{left:g}"])]

    said: list[str] = []
    status = supervise(command, folder / "record", restarts, time_limit, said.append)
    starts = (folder / "starts").read_text().splitlines()
    assert len(said) == len(starts) - 1
    return status, starts


@pytest.mark.parametrize("crash", [1, -signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT])
def test_a_crash_is_resumed(tmp_path, crash):
    assert supervised(tmp_path, f"{crash} {crash} 0") == (0, ["anew", "--resume", "--resume"])


@pytest.mark.parametrize("ending", [0, 2, 124, 130, 143, -signal.SIGTERM, -signal.SIGINT])
def test_what_is_no_crash_is_not(tmp_path, ending):
    status, starts = supervised(tmp_path, f"{ending} 0")
    assert starts == ["anew"]
    assert status == (ending if ending >= 0 else 128 - ending)


def test_not_more_often_than_asked_for(tmp_path):
    assert supervised(tmp_path, "-9 -9 -9 0", restarts=2) == (128 + 9, ["anew", "--resume", "--resume"])


def test_a_start_that_did_not_come_to_write_its_record_is_made_anew(tmp_path, monkeypatch):
    """The record is that of the run before: --resume would continue that one."""
    monkeypatch.setenv("RECORD", "an earlier run's")
    (tmp_path / "record").write_text("an earlier run's")
    assert supervised(tmp_path, "1 0") == (0, ["anew", "anew"])


def test_the_time_limit_is_that_of_all_starts(tmp_path):
    _, starts = supervised(tmp_path, "1 0", time_limit=1000)
    first, second = (float(line.split()[1]) for line in starts)
    assert 990 < second < first <= 1000


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    waits = "import time, sys; open(sys.argv[1], 'w').close(); time.sleep(60)"
    there = tmp_path / "there"

    def ask() -> None:
        while not there.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    status = supervise(
        lambda *_: ["-c", waits, str(there)], tmp_path / "record", 3, None, lambda _: pytest.fail("again")
    )
    assert status == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3h50m", 13800), ("90s", 90), ("1d", 86400), ("1.5h", 5400), ("03:50:00", 13800), ("10:30", 37800)],
)
def test_durations(text, seconds):
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "3", "3x", "h", "-1h", "1h 5m", "1:2", "nan", "infs"])
def test_what_is_no_duration(text):
    with pytest.raises(Exception, match="is not a time such as 3h50m"):
        duration(text)
