"""Restarts: a run whose process was killed or crashed is started again, from its newest checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from chatrlhf.errors.boundary import OUR_FAULT
from chatrlhf.runtime.signals import NUMBERS

# What ends a process that did nothing wrong (memory was short, a node's driver failed), or shows a fault that another
# start may not meet. An error of the user's, or a stop that was asked for, is none of these.
CRASHES = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
LONGEST_PAUSE = 60.0  # seconds before a start; the first is 1, and each is twice the one before


def supervise(
    command: Callable[[bool, float | None], Sequence[str]],
    record: Path,
    restarts: int,
    time_limit: float | None,
    say: Callable[[str], None],
) -> int:
    """Run a command in a process of its own until it ends by itself, and no more than ``restarts`` times again.

    Args:
        command: from whether it is to resume, and the seconds that are left, the words behind ``python``.
        record: the run's manifest; where a crashed start has written it, the next one resumes.
        time_limit: seconds for all of them together.
        say: takes a line for people.

    Returns:
        The exit status of the last start; of one that a signal has ended, 128 and its number.
    """
    began, before, resume = time.monotonic(), _content(record), False
    for start in range(restarts + 1):
        left = None if time_limit is None else max(time_limit - (time.monotonic() - began), 0.0)
        status, was_asked = _run(command(resume, left))
        if was_asked or (status != OUR_FAULT and -status not in CRASHES) or start == restarts:
            break
        resume = resume or _content(record) != before
        pause = min(2.0**start, LONGEST_PAUSE)
        reason = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        say(f"the run ended {reason}; restart {start + 1} of {restarts} in {pause:g} s")
        time.sleep(pause)
    return 128 - status if status < 0 else status


def _run(words: Sequence[str]) -> tuple[int, bool]:
    """Exit status as `subprocess` has it, and whether a signal came here, which is passed on."""
    asked: list[int] = []
    started: list[subprocess.Popen[bytes]] = []
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))

    def pass_on(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for process in started:
            process.send_signal(number)

    previous = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        # In a session of its own: a terminal's Ctrl-C reaches it once, through here.
        environment = os.environ | {"PYTHONPATH": path}
        started.append(subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True))
        for number in asked:  # before it was there
            started[0].send_signal(number)
        return started[0].wait(), bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _content(record: Path) -> bytes | None:
    return record.read_bytes() if record.exists() else None
