"""A process's heap on fake tensors: what a CPU run has from the system is more than its tensors.

glibc hands out the smallest hole that is large enough, joins neighboring holes, and takes more from the system where
none is. A process's memory is therefore all up to the heap's end, holes included (see malloc(3), mallopt(3)).
"""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNED = 64  # bytes: PyTorch's tensors
ROOM_TO_ALIGN = 96  # that a hole needs beside: posix_memalign looks for it, and gives it back
OWN_MAPPING = 32 * 2**20  # larger ones lie apart, and go back to the system: M_MMAP_THRESHOLD at most


class Heap:
    """Addresses of tensors, and where the heap ends.

    Args:
        keeps: nothing lies apart and nothing goes back, as `chatrlhf.runtime.malloc.tune_malloc` has it.
    """

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.end = self.live = 0
        self._holes: list[tuple[int, int]] = []  # (size, start)
        self._starts: dict[int, int] = {}  # start -> size
        self._ends: dict[int, int] = {}  # end -> start

    @property
    def idle(self) -> int:
        """Bytes of holes."""
        return self.end - self.live

    def take(self, size: int) -> tuple[int, int] | None:
        """(start, size) of a tensor; None where it lies apart."""
        size = -(-size // ALIGNED) * ALIGNED
        if size == 0 or (size > OWN_MAPPING and not self.keeps):
            return None
        self.live += size
        place = bisect_left(self._holes, (size + ROOM_TO_ALIGN, 0))
        if place < len(self._holes):
            found, start = self._holes[place]
            self._forget(start)
            if found > size:
                self._remember(start + size, found - size)
            return start, size
        start = self._ends.get(self.end)
        if start is None:
            start = self.end
        else:
            self._forget(start)
        self.end = start + size
        return start, size

    def give(self, start: int, size: int) -> None:
        """Make a hole, one with its neighbors; at the end it goes back to the system, unless it is kept."""
        self.live -= size
        if (before := self._ends.get(start)) is not None:
            size += self._starts[before]
            self._forget(before)
            start = before
        if (behind := self._starts.get(start + size)) is not None:
            self._forget(start + size)
            size += behind
        if start + size == self.end and not self.keeps:
            self.end = start
        else:
            self._remember(start, size)

    def _remember(self, start: int, size: int) -> None:
        insort(self._holes, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _forget(self, start: int) -> None:
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._holes[bisect_left(self._holes, (size, start))]
