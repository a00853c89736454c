"""Each recipe planned at its real size, from the dimensions in the package alone: nothing is reached or written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatrlhf.cli import main

RECIPES = Path(__file__).resolve().parents[2] / "artifacts" / "config"

# (stage, hardware, rows by stage, parameters of the actor, what the plan has to say)
PLANS = {
    "config": ("ALL", "A100-80GB", {"ACTOR": 10_000, "REWARD": 10_000, "RL": 10_000}, 1_315_758_080, "fits"),
    "shurale_7b": ("ACTOR", "4xRTX4090", {"ACTOR": 1_119_582}, 6_738_415_616, "17,494 optimizer steps of 64 rows"),
    "orca_13b_8k": ("ACTOR", "8xA100-80GB", {"ACTOR": 424_864}, 13_015_864_320, "3,320 optimizer steps of 128 rows"),
    "airoboros_33b_16k": ("PRETRAIN", "H200", {}, 32_528_943_616, "100 optimizer steps of 16 rows of 8,192 tokens"),
    "stable_vicuna_13b": ("ACTOR", "8xA100-80GB", {"ACTOR": 400_000}, 13_015_874_560, "DeepSpeed ZeRO-3"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "shurale_7b" else pytest.param(name, marks=pytest.mark.nightly) for name in PLANS]
)
def test_a_recipe_is_planned_at_its_real_size(name, capsys, tmp_path, monkeypatch):
    stage, gpu, rows, parameters, said = PLANS[name]
    monkeypatch.chdir(tmp_path)
    words = [word for key, number in rows.items() for word in ("--rows", f"{key}={number}")]
    assert main([str(RECIPES / f"{name}.yaml"), "--type", stage, "--dry-run", "--gpu", gpu, *words]) == 0
    plan = capsys.readouterr().out.split("\n# plan\n")[1]
    whole, trained = (
        int(each.replace(",", "")) for each in re.search(r"([\d,]+) parameters, ([\d,]+) tr", plan).groups()
    )
    adapters = trained if trained < parameters / 2 else 0
    assert whole - adapters == parameters
    assert said in plan and " GB a device (" in plan and "about " in plan
    assert re.search(r"^  (fits|does NOT fit): [\d.]+ of [\d.]+ GB", plan, re.MULTILINE)
    assert "cannot be reached from here; its dimensions are those in artifacts/config/shapes" in plan
    assert list(tmp_path.iterdir()) == []
