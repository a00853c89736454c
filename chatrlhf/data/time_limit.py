"""Time limit on code that comes with data, such as a template whose loops do not end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Inside, Python code that computes for longer is ended; what waits, or a slow machine, is not.

    Only the main thread can be interrupted; elsewhere, and on systems without such timers, there is no limit.

    Raises:
        TimeoutError: the time is over.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "ITIMER_VIRTUAL"):
        yield
        return

    def stop(*_: Any) -> None:
        raise TimeoutError(f"it has not ended after {seconds:g} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
