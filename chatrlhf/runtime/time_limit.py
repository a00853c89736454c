"""Time limit of a call into code of others: interrupted where Python can be, or else the process ends with a line.

In the main thread a timer's signal interrupts the call. Code that Python cannot interrupt (a loop in C), or that goes
on after any exception, and calls in other threads are ended by a thread that watches, with the process.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from chatrlhf.errors.boundary import USER_ERROR
from chatrlhf.errors.redaction import redacted

GRACE = 10.0  # seconds from the interruption to the end of the process
AGAIN = 1.0  # seconds between two interruptions


class TimeIsUp(BaseException):
    """A call took longer than it may. It is no Exception: code that continues after any of these would ignore it."""


@contextmanager
def within(seconds: float | None, line: str) -> Iterator[None]:
    """Inside, code may take so many seconds; None: any time.

    Args:
        line: the last words where the process has to end.

    Raises:
        TimeIsUp: it took longer, and could be interrupted.
    """
    if seconds is None:
        yield
        return
    last_resort = threading.Timer(seconds + GRACE, _end_process, [redacted(line)])
    last_resort.daemon = True
    last_resort.start()
    try:
        with _interrupted_after(seconds):
            yield
    finally:
        last_resort.cancel()


@contextmanager
def _interrupted_after(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    is_inside = True

    def interrupt(number: int, frame: FrameType | None) -> None:
        if is_inside:
            raise TimeIsUp

    others_handler = signal.signal(signal.SIGALRM, interrupt)
    others_rest, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN)
    began = time.monotonic()
    try:
        yield
    finally:
        is_inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if others_handler is None else others_handler)
        if others_rest:  # somebody else's timer continues
            rest = max(others_rest - (time.monotonic() - began), 0.001)
            signal.setitimer(signal.ITIMER_REAL, rest, others_interval)


def _end_process(line: str) -> None:
    with suppress(OSError):
        os.write(2, f"error: {line}\n".encode())
    os._exit(USER_ERROR)
