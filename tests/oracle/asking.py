"""The oracle's process, and how far what a run said is from what the oracle says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECOMPUTE = Path(__file__).with_name("recompute.py")


class Oracle:
    """`recompute.py` in an interpreter that knows no path but its own packages."""

    def __init__(self) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(RECOMPUTE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __call__(self, question: dict[str, Any]) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the oracle ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> int:
        """Its exit status."""
        assert self.process.stdin
        self.process.stdin.close()
        return self.process.wait()


def difference(said: Any, answer: Any) -> float:
    """The largest difference of two structures of numbers; of numbers beyond 1 in their own unit, as floats round."""
    return max((abs(a - b) / max(1.0, abs(b)) for a, b in _numbers(said, answer)), default=0.0)


def _numbers(said: Any, answer: Any) -> Iterator[tuple[float, float]]:
    if isinstance(said, dict):
        assert said.keys() == answer.keys()
        said, answer = list(said.values()), [answer[name] for name in said]
    if isinstance(said, list):
        assert len(said) == len(answer), (said, answer)
        for a, b in zip(said, answer, strict=True):
            yield from _numbers(a, b)
    else:
        yield float(said), float(answer)
