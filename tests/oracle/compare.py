"""How far what a run computed is from what the oracle recomputes.

python tests/oracle/compare.py                      the table of all families, some two minutes
python tests/oracle/compare.py LLaMA/LoRA Flan-T5   of these
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

from product_run import CASES, Case, questions  # noqa: E402

QUANTITIES = ("SFT loss", "reward", "log-probabilities", "entropy", "values", "KL", "sampled", "greedy")


class Oracle:
    """`recompute.py` in a process of its own, that no path but the interpreter's leads out of."""

    def __init__(self) -> None:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, "-I", str(HERE / "recompute.py")]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, question: dict[str, Any]) -> Any:
        """The answer. Raises RuntimeError where there is none."""
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the oracle ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> int:
        """Its exit status."""
        self.process.stdin.close()
        return self.process.wait()


def differences(case: Case, folder: Path, oracle: Callable[[dict[str, Any]], Any]) -> dict[str, float]:
    """The largest difference of each quantity of a run that is made in ``folder``."""
    largest: dict[str, float] = {}
    answers: dict[str, Any] = {}
    for asked in questions(case, folder):
        key = json.dumps(asked.question)
        if key not in answers:
            answers[key] = oracle(asked.question)
        found = difference(asked.said, asked.part(answers[key]))
        largest[asked.quantity] = max(found, largest.get(asked.quantity, 0.0))
    return largest


def difference(said: Any, answer: Any) -> float:
    """The largest difference of two structures of numbers: absolute up to 1, relative beyond, as floats round.

    It is infinite where the structures are not the same: replies of other lengths, for instance.
    """
    if isinstance(said, dict):
        said, answer = list(said.values()), [answer[name] for name in said]
    if not isinstance(said, list):
        return abs(said - answer) / max(1.0, abs(answer))
    if len(said) != len(answer):
        return math.inf
    return max(map(difference, said, answer), default=0.0)


def row(case: Case, found: dict[str, float]) -> str:
    """A line of the table."""
    cells = (f"{found[name]:.0e}" if found.get(name) else "0" if name in found else "-" for name in QUANTITIES)
    return f"| {case.name} | " + " | ".join(cells) + " |"


HEADER = "| model | " + " | ".join(QUANTITIES) + " |\n|---|" + "---|" * len(QUANTITIES)


def main(names: list[str]) -> None:
    """Print the table of these cases, or of all."""
    import torch

    torch.set_num_threads(1)
    oracle = Oracle()
    print(HEADER)
    for case in CASES:
        if names and case.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            found = differences(case, Path(folder), oracle)
        print(row(case, found), flush=True)
    raise SystemExit(oracle.close())


if __name__ == "__main__":
    main(sys.argv[1:])
