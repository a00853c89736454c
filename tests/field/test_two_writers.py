"""Two writers of one folder, started up to five seconds apart: exactly one runs, and what is left is its own."""

from __future__ import annotations

import random
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from small_run import differences, finish, records, start, start_python, write_config, write_files

from chatrlhf.samples.make_data import make_datasets, to_json

pytestmark = [pytest.mark.slow, pytest.mark.nightly]

SEEDS = (5, 6)
REFUSALS = ("is in use by process", "another run has written into", "refused to overwrite")
# The one that has begun is still there when the other comes.
STAYS = (
    "import time\nfrom chatrlhf.runtime import fault_points\nfault_points.at('run.stage', lambda *_: time.sleep(6))\n"
)
API = (
    STAYS
    + """
import sys
from chatrlhf import load_config, run
from chatrlhf.errors import UserError
try:
    run(load_config(sys.argv[1], [f"output_dir={sys.argv[2]}", f"seed={sys.argv[3]}"]), type="ACTOR")
except UserError as error:
    sys.exit(f"error: {error}")
"""
)


def begin(kind: str, config: Path, folder: Path, seed: int) -> subprocess.Popen[str]:
    if kind == "script":
        return start_python("-m", "chatrlhf.samples.make_data", "--path", str(folder), "--seed", str(seed))
    if kind == "API":
        return start_python("-c", API, str(config), str(folder), str(seed))
    words = [str(config), "--type", "ACTOR", "--output-dir", str(folder), "--set", f"seed={seed}"]
    return start(*words, code=STAYS)


def pairs() -> list[tuple[str, str, float]]:
    """Kinds of both and how many seconds are between their starts: 30 pairs of runs, 20 of scripts."""
    draw = random.Random(0)
    runs = [("CLI", "CLI"), ("CLI", "API"), ("API", "CLI"), ("API", "API")]
    kinds = [runs[i % len(runs)] for i in range(30)] + [("script", "script")] * 20
    return [(first, second, 0.0 if i % 5 == 0 else draw.uniform(0, 5)) for i, (first, second) in enumerate(kinds)]


def left_behind(folder: Path) -> dict[str, Any]:
    """What a run of ACTOR has made: its weights, and what it has measured."""
    weights = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}
    return weights | {"metrics": records(folder, "metrics.jsonl")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A configuration, and what a run of each seed leaves that is alone."""
    files = tmp_path_factory.mktemp("files")
    write_files(files)
    config = write_config(files)
    left = {}
    for seed in SEEDS:
        status, _, err = finish(begin("CLI", config, files / str(seed), seed))
        assert status == 0, err
        left[seed] = left_behind(files / str(seed))
    assert differences(*left.values())
    return config, left


@pytest.mark.parametrize("number", range(50))
def test_exactly_one_of_two_runs(alone, tmp_path, number):
    config, left = alone
    first, second, apart = pairs()[number]
    folder = tmp_path / "out"
    processes = [begin(first, config, folder, SEEDS[0])]
    time.sleep(apart)
    processes.append(begin(second, config, folder, SEEDS[1]))
    ended = [finish(process) for process in processes]
    done = [seed for seed, (status, _, _) in zip(SEEDS, ended, strict=True) if status == 0]
    said = [err for status, _, err in ended if status != 0]
    assert len(done) == 1 and len(said) == 1, ended
    assert "Traceback" not in said[0] and any(refusal in said[0] for refusal in REFUSALS), said[0]
    if first == "script":
        expected = {name: to_json(rows) for name, rows in make_datasets(done[0]).items()}
        assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == expected
    else:
        assert differences(left_behind(folder), left[done[0]]) == []
        assert not (folder / "previous").exists() and not (folder / ".lock").exists()
