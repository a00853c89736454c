"""What a large file of rows costs in time and memory: counted by `chatrlhf data stats`, and mixed for the ACTOR stage.

    python -m benchmarks.streaming
    python -m benchmarks.streaming --gigabytes 0.1

The file is JSONL, of dialogues of some hundred words that differ from row to row, written into a temporary folder. Each
part runs in a process of its own; its peak memory is what the system says of it, all libraries included.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MIX = """
import sys
from chatrlhf.config import load_config
from chatrlhf.data.inputs import read_inputs
section = {"model": "any", "datasets": [{sys.argv[1]: {"fraction": 0.5, "max_val_set": 1000}}], "epochs": 2}
rows = read_inputs(load_config({"actor_config": section}), ["ACTOR"], needs_judgements=False).actor
print(f"{len(rows.train):,} rows in training, {len(rows.held_out):,} held out")
for i in range(0, len(rows.train), 1000):
    rows.train[i]
"""


def main() -> None:
    """Write the file, count it, mix it, and print times and peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="(%(default)s)")
    gigabytes = parser.parse_args().gigabytes
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        rows = write(path, int(gigabytes * 1e9))
        print(f"{rows:,} rows, {path.stat().st_size / 1e9:.2f} GB")
        # The greatest peak of all children so far is asked for: the one that takes less comes first.
        for name, command in (
            ("mixture", [sys.executable, "-c", MIX, str(path)]),
            ("stats", [sys.executable, "-m", "chatrlhf", "data", "stats", str(path)]),
        ):
            began = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
            print(f"{name}: {time.monotonic() - began:.0f} s, peak memory {peak:.2f} GB", flush=True)


def write(path: Path, size: int) -> int:
    """A file of about ``size`` bytes; returns its rows."""
    chance = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(chance.choices(letters, k=chance.randint(1, 9))) for _ in range(20_000)]
    written = rows = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            texts = (" ".join(chance.choices(words, k=chance.randint(30, 200))) for _ in range(2))
            row = dict(zip(("user_input", "completion"), texts, strict=True))
            written += file.write(json.dumps(row) + "\n")
            rows += 1
    return rows


if __name__ == "__main__":
    main()
