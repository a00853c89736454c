"""Engines in processes of their own, in an order that is fair to each, and what is said of many timings."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(command: list[str], threads: int) -> dict[str, Any]:
    """One engine in one process; its last line of output."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def alternating(names: Sequence[str], repeats: int) -> Iterator[str]:
    """Each name ``repeats`` times: forwards, backwards, forwards, …, so that a slow drift hits all alike."""
    for repeat in range(repeats):
        yield from (names if repeat % 2 == 0 else reversed(names))


def spread(seconds: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest."""
    return statistics.median(seconds), min(seconds), max(seconds)


def cell(seconds: Sequence[float]) -> str:
    """The same for a table: ``1.234 (1.200–1.310)``."""
    return "{:.3f} ({:.3f}–{:.3f})".format(*spread(seconds))
