"""SIGTERM and Ctrl-C as a request that training honors at its next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from chatrlhf.runtime.collectives import all_reduce_max


class StopRequest:
    """Within the context the first signal sets ``signal_number``; a second one stops at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.signal_number: int | None = None
        self._say, self._previous = say, {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere (a notebook's worker) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def any_rank_stopped(self) -> int | None:
        """The signal that any rank has got; to be asked by all of them, between two steps."""
        return all_reduce_max(self.signal_number or 0) or None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> Any:
        if self.signal_number is not None:
            raise KeyboardInterrupt
        self.signal_number = number
        self._say(f"{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)")
