"""Whole runs, made again by `chatrlhf reproduce`: bit-equal, or told where not."""

from __future__ import annotations

import shutil
from datetime import date

import pytest
from resuming import stop
from small_run import write_config

from chatrlhf import cli, load_config, run
from chatrlhf.runtime.manifest import Manifest


@pytest.fixture
def config(files, tmp_path):
    for name in ("actor", "reward", "prompts"):
        shutil.copy(files / f"{name}.json", tmp_path)
    return load_config(write_config(tmp_path, output_dir="run"), {"output_dir": str(tmp_path / "run")})


def test_a_run_comes_out_bit_equal_also_one_that_was_resumed_and_other_seeds_do_not(config, tmp_path, capsys):
    stop(config, "ACTOR", 4)
    run(config, type="ACTOR", resume=True)
    run(config, type="ALL", resume=True)  # whose RL reads the demonstrations, too
    stages = Manifest.open(config.run_dir, resume=True).stages
    assert {name: len(stage["calls"]) for name, stage in stages.items()} == {"ACTOR": 2, "REWARD": 1, "RL": 1}
    before = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    assert cli.main(["reproduce", str(config.run_dir)]) == 0
    shown = capsys.readouterr().out
    assert " 0 differs" in shown and "RL kl/ref" in shown and "critic/model.safetensors" in shown
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == before

    assert cli.main(["reproduce", str(config.run_dir), "--set", "seed=6", "--into", str(tmp_path / "other")]) == 2
    shown = capsys.readouterr().out
    assert "differs: setting seed: 5 -> 6" in shown and " 0 differs" not in shown


def test_what_is_another_machine_s_is_compared_within_a_tolerance(config, capsys, monkeypatch):
    from chatrlhf.tools.reproduce import sameness

    run(config, type="ACTOR", day=date(2024, 2, 29))
    there = sameness.hardware
    monkeypatch.setattr(sameness, "hardware", lambda threads: there(threads) | {"gpu": "H100"})
    assert cli.main(["reproduce", str(config.run_dir)]) == 0
    shown = capsys.readouterr().out
    reproduced = config.run_dir.with_name("run-reproduced")
    assert Manifest.open(reproduced, resume=True).facts["day"] == "2024-02-29"  # that a template may show
    assert "differs: hardware, gpu: none -> H100" in shown and "within tolerance (up to 0.001)" in shown
