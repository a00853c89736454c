"""Signals, a closed output and a time limit as requests to stop: at once, or in training behind the next checkpoint.

Whatever a run writes is complete or absent at any moment, so outside the loops that train nothing is lost by stopping
at once: `Interrupted` is raised where the signal arrives. A loop asks `StopRequest` between two steps, saves, and
stops. A second signal does not wait.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from chatrlhf.errors import TIME_IS_UP, Interrupted

# Of terminals, schedulers (Slurm's --signal, LSF's limits) and limits on CPU time; those that a system has.
NUMBERS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU")
    if hasattr(signal, name)
)
OUTPUT_CLOSED = 13  # SIGPIPE, which Python never delivers: the write fails instead
SAME_REQUEST = 0.3  # seconds within which a further signal is the first one's echo: launchers pass on a terminal's
GONE = (errno.EPIPE, errno.EIO)  # of a pipe that no one reads, of a terminal that was closed


class _Requests:
    """What this process was asked; there is one."""

    def __init__(self) -> None:
        self.deadline: float | None = None  # as `time.monotonic` has it
        self.forget()

    def forget(self) -> None:
        self.number: int | None = None
        self.since = 0.0
        self.listening = self.is_training = self.ends_process = False
        self.process = os.getpid()

    def ask(self, number: int) -> None:
        """Take a request to stop, in the main thread."""
        if os.getpid() != self.process:  # a worker that was forked: its parent is asked, too
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self.number is not None and time.monotonic() - self.since < SAME_REQUEST:
            return
        if self.number not in (None, TIME_IS_UP):
            if self.ends_process:
                _say(f"{_name(number)}: stopped at once; --resume continues from the newest checkpoint")
                os._exit(128 + number)
            raise KeyboardInterrupt
        self.number, self.since = number, time.monotonic()
        if not self.is_training:
            raise Interrupted(number)
        _say(f"{_name(number)}: finishing this step, then saving (once more to stop at once)")


_requests = _Requests()


@contextmanager
def listening(ends_process: bool = False) -> Iterator[None]:
    """Inside, signals are requests to stop; those that are ignored (nohup) stay so.

    Only the main thread can listen; elsewhere, in a notebook's worker, signals stay as they are.

    Args:
        ends_process: a second one ends the process, whatever it does; else it is a KeyboardInterrupt.

    Raises:
        Interrupted: at a signal outside a `StopRequest`.
    """
    if _requests.listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in NUMBERS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: _requests.ask(number))
    _requests.listening, _requests.ends_process = True, ends_process
    try:
        yield
    finally:
        for number, handler in previous.items():
            # A process that ends has done all it had to: what comes now ends it without a word.
            signal.signal(number, signal.SIG_DFL if ends_process and handler is not signal.SIG_IGN else handler)
        _requests.forget()


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Inside, training stops by itself before so many seconds are over, counted from here; None: it does not."""
    if seconds is not None:
        _requests.deadline = time.monotonic() + seconds
    try:
        yield
    finally:
        _requests.deadline = None
        if _requests.number == TIME_IS_UP:
            _requests.number = None


def stop_if_asked(then: str = "") -> None:
    """Raise Interrupted where a request has come: while a loop made its last step, or its exception was lost, in a
    library's finalizer for instance.
    """
    is_late = _requests.deadline is not None and time.monotonic() > _requests.deadline
    if _requests.number is not None or is_late:
        raise Interrupted(_requests.number or TIME_IS_UP, then)


def output_closed(error: OSError) -> None:
    """Whoever read standard output has gone: a request to stop, and what is said from now on is dropped.

    Raises:
        OSError: it is something else.
        Interrupted: outside a `StopRequest`.
    """
    if error.errno not in GONE:
        raise error
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if threading.current_thread() is threading.main_thread() and _requests.number is None:
        _requests.ask(OUTPUT_CLOSED)


class StopRequest:
    """A loop that trains, and asks between two steps whether it is to stop."""

    def __init__(self) -> None:
        self._last_asked = time.monotonic()
        self._listening = listening()

    def __enter__(self) -> StopRequest:
        self._listening.__enter__()
        _requests.is_training = True
        self._last_asked = time.monotonic()
        return self

    def any_rank_stopped(self) -> int | None:
        """What any rank was asked by, a signal's number or TIME_IS_UP; to be called by all, between two steps."""
        from chatrlhf.runtime.collectives import all_reduce_max  # brings torch

        _requests.number = all_reduce_max(_requests.number or self._time_is_up()) or None
        return _requests.number

    def _time_is_up(self) -> int:
        """TIME_IS_UP where another step as long as the last would end behind the time limit, else 0."""
        now = time.monotonic()
        step, self._last_asked = now - self._last_asked, now
        return TIME_IS_UP if _requests.deadline is not None and now + step > _requests.deadline else 0

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _requests.is_training = False
        self._listening.__exit__(kind, error, trace)


def _name(number: int) -> str:
    return signal.Signals(number).name


def _say(text: str) -> None:
    """A line on standard error by one system call: `print` cannot be called again while it prints."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
