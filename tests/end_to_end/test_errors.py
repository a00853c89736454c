"""What goes wrong on the user's side is one line with file, row, field and remedy; nothing is written over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small_run import write_config, write_files

from chatrlhf.cli import main

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, folder: Path, *words: str, config: Path | None = None) -> str:
    """The one line that a refused run prints; the folder is as it was before."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    status = main([str(config or folder / "config.yaml"), "--output-dir", str(folder / "run"), *words])
    line = capsys.readouterr().err
    assert status == 2
    assert line.startswith("error: ") and line.count("\n") == 1, line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return line


def edit(path: Path, row: int, **fields) -> None:
    rows = json.loads(path.read_text())
    for name, value in fields.items():
        if value is ...:
            del rows[row - 1][name]
        else:
            rows[row - 1][name] = value
    path.write_text(json.dumps(rows))


@pytest.mark.parametrize("stage", ["ALL", "ACTOR"])
def test_missing_file(capsys, folder, stage):
    write_config(folder, actor_config__train_dataset_path="nowhere.json")
    line = refused(capsys, folder, "--type", stage)
    assert "actor_config.train_dataset_path" in line and "nowhere.json" in line and str(folder) in line


@pytest.mark.parametrize("stage", ["ALL", "ACTOR"])
def test_broken_json(capsys, folder, stage):
    (folder / "actor.json").write_text('[{"user_input": "a", "completion": "b"},\n {"user_input": }]')
    write_config(folder)
    line = refused(capsys, folder, "--type", stage)
    assert "actor.json, line 2, column 17: broken JSON" in line


def test_broken_jsonl_names_the_row(capsys, folder):
    (folder / "actor.jsonl").write_text('{"user_input": "a", "completion": "b"}\n{"user_input"\n')
    write_config(folder, actor_config__train_dataset_path="actor.jsonl")
    assert "actor.jsonl, row 2" in refused(capsys, folder, "--type", "ACTOR")


def test_wrong_type(capsys, folder):
    edit(folder / "actor.json", 3, completion=7)
    write_config(folder)
    assert "actor.json, row 3, field 'completion': expected text, got int 7" in refused(capsys, folder)


def test_missing_key(capsys, folder):
    edit(folder / "prompts.json", 2, user_input=...)
    write_config(folder)
    assert "prompts.json, row 2: field 'user_input' is missing" in refused(capsys, folder)


def test_empty_dataset(capsys, folder):
    (folder / "prompts.json").write_text("[]")
    write_config(folder)
    assert "prompts.json: it holds no rows" in refused(capsys, folder)


@pytest.mark.parametrize("name", ["actor", "reward", "prompts"])
def test_all_rows_longer_than_the_context(capsys, folder, name):
    rows = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps([row | {"user_input": "z q " * 200} for row in rows]))
    write_config(folder)
    line = refused(capsys, folder)
    assert f"{name}.json: all 60 rows are longer than the context" in line and "limit 96" in line


@pytest.mark.parametrize("score, said", [(float("nan"), "nan is not a finite number"), ("high", "expected a number")])
def test_a_score_that_is_no_number(capsys, folder, score, said):
    edit(folder / "reward.json", 5, score=score)
    write_config(folder)
    line = refused(capsys, folder)
    assert "reward.json, row 5, field 'score'" in line and said in line


def test_a_null_score_names_the_script_that_fills_it(capsys, folder):
    edit(folder / "reward.json", 5, score=None)
    write_config(folder)
    line = refused(capsys, folder)
    assert "row 5, field 'score'" in line and "generate_rewards.py" in line


def test_unknown_key(capsys, folder):
    config = write_config(folder)
    config.write_text(config.read_text() + "reward_confg: {}\n")
    assert "unknown key 'reward_confg'; did you mean 'reward_config'?" in refused(capsys, folder)


@pytest.mark.parametrize(
    "words, key",
    [
        (("-a", "no/such-model"), "actor_config.model"),
        (("-r", "no/such-model"), "reward_config.model"),
        (("--set", "critic_config.model=no/such-model"), "critic_config.model"),
    ],
)
def test_unknown_model(capsys, folder, words, key):
    write_config(folder)
    line = refused(capsys, folder, *words)
    assert key in line and "'no/such-model' cannot be loaded" in line


def test_rollouts_that_do_not_divide(capsys, folder):
    write_config(folder)
    line = refused(capsys, folder, "--set", "trainer_config.num_rollouts=10")
    assert "num_rollouts: 10 is not divisible by batch_size (4)" in line and "8 or 12" in line


def test_no_reward_model(capsys, folder):
    write_config(folder)
    line = refused(capsys, folder, "--type", "RL")
    assert "run --type REWARD first" in line and "reward_fn" in line


@pytest.mark.parametrize(
    "body, said", [("[1.0]", "returned 1 scores for 2"), ("[float('nan')] * len(c)", "score 0 is nan")]
)
def test_a_reward_function_that_misbehaves(capsys, folder, body, said):
    name = f"rewards_{abs(hash(body))}"
    (folder / f"{name}.py").write_text(f"def score(p, c):\n    return {body}\n")
    write_config(folder)
    words = (
        "--type",
        "RL",
        "--set",
        f"reward_config.reward_fn={name}:score",
        "--set",
        "trainer_config.validation_fraction=0",
    )
    status = main([str(folder / "config.yaml"), "--output-dir", str(folder / "run"), *words])
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1
    assert said in line and f"{name}:score" in line
    assert not (folder / "run" / "actor_rl").exists()


def test_a_reward_function_that_cannot_be_imported(capsys, folder):
    write_config(folder)
    line = refused(capsys, folder, "--type", "RL", "--set", "reward_config.reward_fn=no_such_module:score")
    assert "reward_config.reward_fn" in line and "no_such_module" in line


def test_a_failing_rerun_leaves_earlier_results_alone(capsys, folder):
    write_config(folder)
    (folder / "run" / "actor").mkdir(parents=True)
    (folder / "run" / "actor" / "model.safetensors").write_bytes(b"mine")
    refused(capsys, folder, "-a", "no/such-model")
    assert os.listdir(folder / "run") == ["actor"]
