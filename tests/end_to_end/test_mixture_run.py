"""Datasets in their own shapes, mixed, through all three stages: each draws from the records what it can use."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from small_run import settings

from chatrlhf import load_config, run
from chatrlhf.data.templates import FORMATS, Template

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def message(text: str, role: str, *replies: dict, rank: int | None = None) -> dict[str, Any]:
    return {"text": text, "role": role, "lang": "en", "rank": rank, "deleted": False, "replies": list(replies)}


@pytest.fixture
def datasets(tmp_path):
    """Trees, pairs and a text, where a small model can read them."""
    trees = [
        message(
            f"why {i}",
            "prompter",
            message("so", "assistant", message(f"and {i}", "prompter", message("yes", "assistant")), rank=0),
            message("no", "assistant", rank=1),
        )
        for i in range(20)
    ]
    rows = [
        {"message_tree_id": str(i), "tree_state": "ready_for_export", "prompt": tree} for i, tree in enumerate(trees)
    ]
    (tmp_path / "trees.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    start = "\n\nHuman: hi {}\n\nAssistant:"
    pairs = [{"chosen": start.format(i) + " ho", "rejected": start.format(i) + " ha"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (tmp_path / "story.txt").write_text(" ".join(f"once {i} long" for i in range(40)), encoding="utf-8")
    return tmp_path


def mixed(folder: Path, trees: dict, pairs: dict, text: str, **actor: Any) -> dict[str, Any]:
    made = settings(folder)
    del made["actor_config"]["train_dataset_path"], made["reward_config"]["train_dataset_path"]
    del made["trainer_config"]["examples_path"]
    made["actor_config"] |= {"template": "orca", "loss_on": "all_turns", **actor}
    made["actor_config"]["datasets"] = [{"OASST1": trees}, {text: {"max_chunk_size": 60}}]
    made["reward_config"]["datasets"] = [{"OASST1": trees}, {"ARLHF": pairs}]
    made["trainer_config"] |= {"datasets": [{"OASST1": trees}], "total_episodes": 16, "eval_interval": None}
    return made | {"output_dir": str(folder / "run")}


def test_every_stage_draws_from_its_mixture(datasets, capsys):
    trees, pairs = ({"source": str(datasets / name)} for name in ("trees.jsonl.gz", "pairs.jsonl"))
    result = run(load_config(mixed(datasets, trees, pairs, str(datasets / "story.txt"))))
    assert list(result.stages) == ["ACTOR", "REWARD", "RL"]
    said = capsys.readouterr()
    said = said.out + said.err
    assert "ACTOR: 63 rows in training, 6 held out" in said  # 60 paths and 9 pieces of the story
    assert "REWARD: 36 rows in training, 4 held out" in said  # a pair of each tree, and each pair
    assert "RL: 36 rows in training, 4 held out" in said
    manifest = json.loads((result.output_dir / "manifest.json").read_text(encoding="utf-8"))
    assert [Path(path).name for path in manifest["stages"]["REWARD"]["inputs"]] == ["trees.jsonl.gz", "pairs.jsonl"]
    assert Template.load(result.output_dir / "actor_rl") == FORMATS["orca"]


@pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
def test_real_datasets_go_through_all_stages(tmp_path):
    trees = {"source": str(REAL / "oasst1" / "trees.jsonl.gz"), "size": 60, "max_val_set": 10}
    pairs = {"source": str(REAL / "hh-rlhf"), "size": 60, "max_val_set": 10}
    made = mixed(tmp_path, trees, pairs, str(REAL / "tinyshakespeare" / "input.txt"), max_sequence_length=512)
    made["actor_config"]["tiny"] |= {"max_position_embeddings": 512, "vocab_size": 1000}
    seeds = {"source": str(REAL / "self-instruct" / "seed_tasks.jsonl"), "size": 40}
    made["actor_config"]["datasets"] = [
        {"OASST1": trees},
        {"self-instruct": seeds},
        {str(REAL / "tinyshakespeare" / "input.txt"): {"max_chunk_size": 500, "size": 20}},
    ]
    made["trainer_config"]["datasets"] += [{"self_instruct": seeds}]
    result = run(load_config(made))
    metrics = result.stages["ACTOR"].metrics
    assert metrics["loss/eval"] < 6.9  # of a thousand tokens, none of them known
    assert 0 <= result.stages["REWARD"].metrics["reward/accuracy"] <= 1
    assert result.stages["RL"].metrics["response/length"] >= 1
