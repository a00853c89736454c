"""Limits on templates, which are code that comes with data: computing time, memory, length of what they print."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

if sys.platform == "linux":
    import resource

RENDERING_SECONDS = 10.0  # of computing, for one conversation
ROOM = 2**30  # bytes of memory beyond what the process has
# Characters of a rendering beyond this many times the conversation's own: no template says so much.
MOST_CHARS, REPEATS = 1_000_000, 4
STATM = "/proc/self/statm"  # Linux: its first number is the address space, in pages
PAGE = mmap.PAGESIZE


@contextmanager
def render_limits() -> Iterator[None]:
    """Inside, a template that computes for too long or asks for too much memory is ended.

    Python code is interrupted between two operations, on every system and in every thread. Memory is limited in the
    main thread on Linux; elsewhere `refuse_long` comes after the fact.

    Raises:
        TimeoutError, MemoryError: with the reason.
    """
    is_main = threading.current_thread() is threading.main_thread()
    with cpu_limit(RENDERING_SECONDS), memory_limit(ROOM) if is_main else nullcontext():
        yield


def refuse_long(rendered: str, given: Any) -> None:
    """Raise a ValueError where a rendering is far longer than the texts it was made of, in dictionaries and lists."""
    if len(rendered) > MOST_CHARS and len(rendered) > MOST_CHARS + REPEATS * _chars(given):
        raise ValueError(f"it prints {len(rendered):,} characters for a conversation of {_chars(given):,}")


def _chars(given: Any) -> int:
    if isinstance(given, str):
        return len(given)
    parts = given.values() if isinstance(given, Mapping) else given if isinstance(given, (list, tuple)) else ()
    return sum(map(_chars, parts))


class _TimeIsOver(BaseException):
    """No Exception, because Jinja passes over those that come while it computes what is constant in a template."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Inside, Python code that computes for longer is ended; in the main thread what waits, or a slow machine, is not.

    Raises:
        TimeoutError: the time is over.
    """
    is_main = threading.current_thread() is threading.main_thread()
    by_signal = is_main and hasattr(signal, "ITIMER_VIRTUAL")
    try:
        with _timer(seconds) if by_signal else _watching_thread(seconds):
            yield
    except _TimeIsOver:
        raise TimeoutError(f"it has not ended after {seconds:g} seconds") from None


@contextmanager
def _timer(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TimeIsOver

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _watching_thread(seconds: float) -> Iterator[None]:
    """Where there are no signals: another thread raises an exception in this one."""
    thread, lock, is_over = threading.get_ident(), threading.Lock(), False
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc

    def stop() -> None:
        with lock:
            if not is_over:
                raise_in(ctypes.c_ulong(thread), ctypes.py_object(_TimeIsOver))

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            is_over = True
            raise_in(ctypes.c_ulong(thread), None)  # one that was raised just now, and has not come yet


def _address_space() -> int:
    """Bytes. By system calls alone: a row's rendering takes no longer than opening a file by Python's `open`."""
    file = os.open(STATM, os.O_RDONLY)
    try:
        return int(os.read(file, 32).split(b" ", 1)[0]) * PAGE
    finally:
        os.close(file)


@contextmanager
def memory_limit(room: int) -> Iterator[None]:
    """Inside, the process cannot take more than so many bytes beyond its own; without effect where that is not known.

    Only for the main thread: another thread's limit could outlast it.

    Raises:
        MemoryError: it would have taken more.
    """
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        most = _address_space() + room
    except (OSError, ValueError):  # no /proc in this container
        yield
        return
    if soft != resource.RLIM_INFINITY and soft <= most:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it needs more than {room / 2**30:g} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
