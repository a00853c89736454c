"""Runs that an earlier tree began are resumed by this one, and end with the numbers that the earlier tree had.

`tests/fixtures/freeze_runs.py` made them. On the processor and the release of PyTorch that they were made on every bit
is the same; elsewhere other roundings draw other tokens, so there the stages before RL are compared, by tolerance.
"""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest
import yaml
from fixtures.freeze_runs import STAGES, STOPPED, machine, numbers

from chatrlhf import load_config, run

FIXTURES = Path(__file__).parents[1] / "fixtures"
FROZEN = json.loads((FIXTURES / "frozen_runs.json").read_text())


FEW_STEPS = {"guards_config.allow_untrained_actor": True}


def of_stages(rows: list[dict], stages: tuple[str, ...]) -> list[dict]:
    return [row for row in rows if row["stage"] in stages]


@pytest.mark.parametrize("case, stage", [(case, stage) for case, stages in STOPPED.items() for stage in stages])
def test_resumed_to_the_same_numbers(case, stage, tmp_path, monkeypatch):
    with tarfile.open(FIXTURES / "frozen_runs.tar.xz") as archive:
        members = [each for each in archive.getmembers() if "stopped_in" not in each.name or stage in each.name]
        archive.extractall(tmp_path, [each for each in members if each.name.startswith(f"{case}/")], filter="data")
    monkeypatch.chdir(tmp_path / case)
    tree, folder = yaml.safe_load(Path("config.yaml").read_text()), Path(f"stopped_in_{stage}")
    for name in STAGES[STAGES.index(stage) :]:
        run(load_config(tree, {"output_dir": str(folder)} | FEW_STEPS), type=name, resume=name == stage)
    got, want = numbers(folder), FROZEN[case]
    if machine() == FROZEN["machine"]:
        assert got == want
        return
    assert got["weights"].keys() == want["weights"].keys()
    before = tuple(name for name in STAGES if name != "RL")
    for mine, theirs in zip(of_stages(got["metrics"], before), of_stages(want["metrics"], before), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert mine[key] == (pytest.approx(value, rel=1e-2, abs=1e-3) if isinstance(value, float) else value), key
    finite = [value for row in got["metrics"] for value in row.values() if isinstance(value, float)]
    assert finite and all(map(math.isfinite, finite))
