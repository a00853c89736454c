"""How glibc hands out memory, where tensors of a few MiB come and go by the thousand.

Other C libraries, and other systems, are left as they are.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any

# Parameters and their numbers, of glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
NEVER = 2**31 - 1  # bytes; the greatest number that mallopt takes


@cache
def tune_malloc() -> None:
    """Have this process keep what it frees, in one heap, for what it asks for next.

    What is given back to the system has to be mapped and zeroed anew, page by page: a twentieth of an update of a small
    model. With a heap for each thread, what one of them has freed is of no use to the other; a run of the benchmark
    took 80 MiB more.
    """
    for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_THRESHOLD, NEVER), (M_TRIM_THRESHOLD, NEVER)):
        _of_glibc("mallopt", parameter, value)


def trim_malloc() -> None:
    """Once, before work of another kind, which would find holes of the wrong sizes and take new memory beside them."""
    _of_glibc("malloc_trim", 0)


def _of_glibc(name: str, *args: Any) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*args)
