"""Two pieces of work side by side on a CPU, a thread and half of the cores for each.

Splitting every operation of a small model over all cores costs more in waiting than running two models at once, each
on cores of its own. PyTorch releases Python's lock inside its operations, so plain threads are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

A, B = TypeVar("A"), TypeVar("B")

_one_lane = False


def run_in_parallel(first: Callable[[], A], second: Callable[[], B], device: torch.device) -> tuple[A, B]:
    """What both give. They must not write to the same memory.

    On a GPU, which is busy with either, and on a single core they run one after the other where the caller is.

    Raises:
        What the first of them to fail raised, once both have ended.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2 or _one_lane:
        return first(), second()
    with_gradients = torch.is_grad_enabled()

    def run(work: Callable[[], A | B]) -> A | B:
        # A thread of its own does not know whether the caller's wants gradients.
        with torch.set_grad_enabled(with_gradients):
            return work()

    running = [_pool(threads).submit(run, work) for work in (first, second)]
    wait(running)
    return running[0].result(), running[1].result()


@contextmanager
def sequential() -> Iterator[None]:
    """Inside, work is done in one order, the same in every process: where it talks to the others on its way."""
    global _one_lane
    before, _one_lane = _one_lane, True
    try:
        yield
    finally:
        _one_lane = before


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    """Two threads that share so many cores."""
    all_here = Barrier(3)

    def begin() -> None:
        torch.get_num_threads()  # a new thread's number is set when it is first asked for
        torch.set_num_threads(threads // 2)
        all_here.wait()

    pool = ThreadPoolExecutor(2, "chatrlhf-lane", begin)
    for _ in range(2):
        pool.submit(int)
    all_here.wait()
    # What other threads yet to come start with; those two keep their own.
    torch.set_num_threads(threads)
    return pool
