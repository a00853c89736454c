"""Watchdog: where nothing has moved for a set time it names process and phase, and what each thread does.

A reward function that waits for ever, a collective that one process does not reach, a disk that does not answer: all
look alike from outside.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chatrlhf.errors.boundary import OUR_FAULT

LONGEST_SLEEP = 5.0  # seconds between two looks
Limits = tuple[float | None, float | None]


class _Progress:
    """The newest sign of life of this process; there is one."""

    def __init__(self) -> None:
        self.at, self.phase = time.monotonic(), "starting"


_progress = _Progress()


def beat(phase: str) -> None:
    """Something has moved, and this is what comes next."""
    _progress.at, _progress.phase = time.monotonic(), phase


def newest_phase() -> str:
    """What this process does, as it said last."""
    return _progress.phase


@contextmanager
def watched(run_dir: Path, limits: Limits, rank: int) -> Iterator[None]:
    """Inside, a thread looks for progress.

    Args:
        run_dir: ``stacks-rank<N>.txt`` goes there.
        limits: seconds without progress at which it is said, and at which the process ends; None: never.
    """
    if limits == (None, None):
        yield
        return
    beat("starting")
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(over, run_dir, limits, rank), name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(over: threading.Event, run_dir: Path, limits: Limits, rank: int) -> None:
    warn, stop = limits
    known = [limit for limit in limits if limit is not None]
    said = -1.0  # the sign of life whose absence was said
    while not over.wait(max(min(LONGEST_SLEEP, min(known) / 4), 0.01)):
        at, phase = _progress.at, _progress.phase
        silent = time.monotonic() - at
        ends = stop is not None and silent > stop
        if not ends and (warn is None or silent <= warn or at == said):
            continue
        said = at
        where = f"process {os.getpid()} (rank {rank}): nothing has moved for {silent:.0f} s, since: {phase}"
        stacks = _dump(run_dir / f"stacks-rank{rank}.txt", where)
        what = "the run ends (guards_config.silence); --resume continues" if ends else "the run waits"
        _say(f"warning: {where}; {what}" + (f"; what each thread does is in {stacks}" if stacks else ""))
        if ends:
            os._exit(OUR_FAULT)


def _dump(path: Path, headline: str) -> Path | None:
    """What each thread does now, the newest call first; None where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {headline}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n")
    except OSError:
        return None
    return path


def _say(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())
