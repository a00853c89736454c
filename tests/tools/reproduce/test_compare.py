"""Two runs compared: metrics, samples, files."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from chatrlhf.tools.reproduce.compare import Compared, compare_runs
from chatrlhf.tools.reproduce.report import show, summary


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """A run's folder and its copy."""
    first = tmp_path / "run"
    (first / "actor").mkdir(parents=True)
    save_file({"a": torch.ones(4), "b": torch.arange(3.0)}, first / "actor" / "model.safetensors")
    (first / "actor" / "contents.json").write_text("{}")
    (first / "actor" / "config.json").write_text(json.dumps({"base": str(first / "pretrained"), "sizes": [1, 2.5]}))
    (first / "actor" / "words.model").write_bytes(b"\xff\x00")
    steps = [{"stage": "ACTOR", "step": step, "loss": 2.0 / step, "time/step": 0.1, "tokens/s": 9.0} for step in (1, 2)]
    write(first, "metrics.jsonl", [*steps, {"stage": "ACTOR", "step": 2, "eval": math.nan}, {"stage": "RL", "step": 1}])
    write(first, "samples.jsonl", [{"stage": "ACTOR", "step": 1, "text": "a", "score": 1.0}])
    second = shutil.copytree(first, tmp_path / "again")
    (second / "actor" / "config.json").write_text(json.dumps({"base": str(second / "pretrained"), "sizes": [1, 2.5]}))
    return first, second


def write(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def by_name(runs) -> dict[str, Compared]:
    return {each.what: each for each in compare_runs(*runs, ["ACTOR"])}


def test_a_copy_is_equal_but_for_the_name_of_its_folder(runs):
    names = ["ACTOR eval", "ACTOR loss", "ACTOR samples"]
    names += ["actor/config.json", "actor/model.safetensors", "actor/words.model"]
    assert {each.what: each.verdict(0.0) for each in compare_runs(*runs, ["ACTOR"])} == dict.fromkeys(names, "equal")


def test_times_are_left_out_and_numbers_compared_by_step(runs):
    changed = rows(runs[1], "metrics.jsonl")
    changed[0] |= {"time/step": 7.0, "tokens/s": 1.0}
    changed[1]["loss"] = 1.01
    write(runs[1], "metrics.jsonl", changed)
    loss = by_name(runs)["ACTOR loss"]
    assert loss.difference == pytest.approx(0.01 / 1.01) and loss.where == "step 2" and loss.size == "2 steps"
    assert loss.verdict(0.0) == "differs" and loss.verdict(0.01) == "within"
    assert not [name for name in by_name(runs) if "time" in name or "tokens" in name]


def test_a_step_or_a_metric_that_one_run_lacks_differs(runs):
    write(runs[1], "metrics.jsonl", rows(runs[1], "metrics.jsonl")[1:2])
    found = by_name(runs)
    assert found["ACTOR loss"].difference == math.inf and found["ACTOR loss"].where == "step 1"
    assert found["ACTOR eval"].verdict(1.0) == "differs"


def test_samples_are_compared_by_text_and_number(runs):
    sample = rows(runs[1], "samples.jsonl")[0]
    write(runs[1], "samples.jsonl", [sample | {"score": 1.5}])
    assert by_name(runs)["ACTOR samples"].difference == pytest.approx(0.5 / 1.5)
    write(runs[1], "samples.jsonl", [sample | {"text": "b"}])
    assert by_name(runs)["ACTOR samples"].difference == math.inf
    write(runs[1], "samples.jsonl", [sample, sample])
    assert by_name(runs)["ACTOR samples"].where == "the number of rows"


def test_weights_are_compared_tensor_by_tensor(runs):
    path = runs[1] / "actor" / "model.safetensors"
    save_file({"a": torch.tensor([1.0, 1.0, 1.0, 1.002]), "b": torch.arange(3.0)}, path)
    found = by_name(runs)["actor/model.safetensors"]
    assert found.where == "a" and found.difference == pytest.approx(0.001, rel=1e-3)
    save_file({"a": torch.ones(4), "c": torch.arange(3.0)}, path)
    assert by_name(runs)["actor/model.safetensors"].difference == math.inf
    save_file({"a": torch.ones(5), "b": torch.arange(3.0)}, path)
    assert by_name(runs)["actor/model.safetensors"].where == "a"
    save_file({"a": torch.full((4,), math.nan), "b": torch.arange(3.0)}, path)
    assert by_name(runs)["actor/model.safetensors"].difference == math.inf


def test_other_files_are_compared_by_what_is_in_them(runs):
    folder = runs[1] / "actor"
    (folder / "config.json").write_text(json.dumps({"base": str(runs[1] / "pretrained"), "sizes": [1, 2.6]}))
    found = by_name(runs)["actor/config.json"]
    assert found.where == "sizes[1]" and found.difference == pytest.approx(0.1 / 2.6)
    (folder / "config.json").write_text(json.dumps({"base": "elsewhere", "sizes": [1, 2.5]}))
    assert by_name(runs)["actor/config.json"].where == "base"
    (folder / "words.model").write_bytes(b"\xff\x01")
    assert by_name(runs)["actor/words.model"].difference == math.inf
    (folder / "words.model").unlink()
    assert by_name(runs)["actor/words.model"].where == f"only one run has it, not {runs[1]}"


def test_the_table_says_what_is_equal_within_and_not(capsys):
    found = [Compared("a", "1 step", 0.0), Compared("b", "1 step", 1e-4, "step 1"), Compared("c", "1", math.inf, "x")]
    show(Console(), found, 1e-3)
    shown = capsys.readouterr().out
    assert "1.0e-04" in shown and "within tolerance" in shown and "differs" in shown
    assert summary(found, 1e-3) == "3 comparisons: 1 equal, 1 within tolerance (up to 0.001), 1 differs"
    assert summary(found, 0.0) == "3 comparisons: 1 equal, 0 within tolerance, 2 differs"
