"""`sort_by_length`, from the configuration to the tokens that are padding, and over an interruption."""

from __future__ import annotations

import json
import os
import signal

import pytest
from small_run import GREETINGS, settings

from chatrlhf import load_config, run
from chatrlhf.errors import Interrupted
from chatrlhf.trainers import global_batches
from chatrlhf.trainers.hf_stage import StageCallback


@pytest.fixture
def files(tmp_path):
    """Rows of 1 to 8 greetings."""
    texts = [" ".join(GREETINGS[(i + j) % 8] for j in range(1 + i * 5 % 8)) + f" {i}" for i in range(60)]
    rows = [{"user_input": f"say {i}", "completion": text} for i, text in enumerate(texts)]
    pairs = [{"user_input": f"say {i}", "chosen": text, "rejected": "no"} for i, text in enumerate(texts)]
    scored = [row | {"score": i % 3} for i, row in enumerate(rows)]
    for name, content in (("actor", rows), ("pairs", pairs), ("reward", scored)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


@pytest.fixture
def masks(monkeypatch):
    """The mask of every microbatch that is trained on."""
    caught: list[list[list[bool]]] = []
    compute_loss = global_batches.GlobalBatches.compute_loss

    def catching(self, model, inputs, *args, **kwargs):
        if model.training:
            caught.append([row.bool().tolist() for row in inputs["attention_mask"]])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(global_batches.GlobalBatches, "compute_loss", catching)
    return caught


def trained(files, name, stage, resume=False, rows="reward", **keys):
    made = settings(files)
    made["actor_config"]["tiny"]["max_position_embeddings"] = made["actor_config"]["max_sequence_length"] = 300
    made["reward_config"]["train_dataset_path"] = str(files / f"{rows}.json")
    made[f"{stage.lower()}_config"] |= {"epochs": 2, "batch_size": 4, **keys}
    made["output_dir"] = str(files / name)
    return run(load_config(made), type=stage, resume=resume)


def padding(masks) -> int:
    return sum(not real for mask in masks for row in mask for real in row)


@pytest.mark.parametrize(("stage", "rows"), [("ACTOR", None), ("REWARD", "pairs"), ("REWARD", "reward")])
def test_less_is_padding(files, masks, stage, rows):
    counts, tokens = [], []
    for sort_by_length in (False, True):
        masks.clear()
        trained(files, str(sort_by_length), stage, rows=rows, sort_by_length=sort_by_length)
        counts.append(padding(masks))
        tokens.append(sorted(sum(row) for mask in masks for row in mask))
    assert tokens[0] == tokens[1]  # the same rows are seen
    assert counts[1] < (0.7 if rows == "pairs" else 0.5) * counts[0]


@pytest.mark.parametrize("calls", [5, 20])  # in the first epoch of 14 steps, and in the second
def test_a_resumed_run_goes_on_with_the_same_batches(files, masks, monkeypatch, calls):
    trained(files, "whole", "ACTOR", sort_by_length=True)
    whole = list(masks)
    masks.clear()
    on_log, count = StageCallback.on_log, [0]

    def interrupting(self, *args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return on_log(self, *args, **kwargs)

    monkeypatch.setattr(StageCallback, "on_log", interrupting)
    with pytest.raises(Interrupted):
        trained(files, "resumed", "ACTOR", sort_by_length=True)
    assert 0 < len(masks) < len(whole)
    trained(files, "resumed", "ACTOR", resume=True, sort_by_length=True)
    assert masks == whole
    resumed, undisturbed = (files / name / "actor" / "model.safetensors" for name in ("resumed", "whole"))
    assert resumed.read_bytes() == undisturbed.read_bytes()
