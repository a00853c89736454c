"""What makes the batches of a stage, from the configuration to the tokens that are trained on."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
from small_run import GREETINGS, length, settings

from chatrlhf import load_config, run
from chatrlhf.errors import Interrupted
from chatrlhf.models.reward_model import load_reward_model
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.stages import global_batches
from chatrlhf.stages.hf_trainer import StageCallback


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
def batches(monkeypatch):
    """The rows of every microbatch that is trained on: ids, and None where they are padding."""
    caught: list[list[list[int | None]]] = []
    compute_loss = global_batches.GlobalBatches.compute_loss

    def catching(self, model, inputs, *args, **kwargs):
        if model.training:
            rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].bool().tolist(), strict=True)
            caught.append([[i if real else None for i, real in zip(*row, strict=True)] for row in rows])
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(global_batches.GlobalBatches, "compute_loss", catching)
    return caught


def real(batches) -> list[list[int]]:
    """All rows, in order of size."""
    return sorted([i for i in row if i is not None] for batch in batches for row in batch)


def trained(files, name, stage, resume=False, rows="reward", **keys):
    made = settings(files)
    made["actor_config"]["tiny"]["max_position_embeddings"] = made["actor_config"]["max_sequence_length"] = 300
    made["reward_config"]["train_dataset_path"] = str(files / f"{rows}.json")
    made[f"{stage.lower()}_config"] |= {"epochs": 2, "batch_size": 4, **keys}
    made["output_dir"] = str(files / name)
    return run(load_config(made), type=stage, resume=resume)


def padding(batches) -> int:
    return sum(i is None for batch in batches for row in batch for i in row)


@pytest.mark.parametrize(("stage", "rows"), [("ACTOR", None), ("REWARD", "pairs"), ("REWARD", "reward")])
def test_less_is_padding(files, batches, stage, rows):
    counts, rows_seen = [], []
    for sort_by_length in (False, True):
        batches.clear()
        trained(files, str(sort_by_length), stage, rows=rows, sort_by_length=sort_by_length)
        counts.append(padding(batches))
        rows_seen.append(real(batches))
    assert rows_seen[0] == rows_seen[1]
    assert counts[1] < (0.7 if rows == "pairs" else 0.5) * counts[0]


HALF = {"fraction": 0.5, "val_split": 0.1}


def test_the_second_epoch_sees_what_the_first_did_not(files, batches):
    datasets = [{str(files / "actor.json"): HALF}]
    trained(files, "run", "ACTOR", datasets=datasets, train_dataset_path=None)
    first, second = real(batches[: len(batches) // 2]), real(batches[len(batches) // 2 :])
    assert len(first) == len(second) == 27 and not [row for row in first if row in second]


@pytest.mark.parametrize("calls", [5, 12])  # in the first epoch of 7 steps, and in the second
@pytest.mark.parametrize("key", ["train_dataset_path", "datasets"])
def test_a_resumed_run_goes_on_with_the_same_batches(files, batches, monkeypatch, calls, key):
    keys = {"sort_by_length": True, "batch_size": 8}
    if key == "datasets":
        keys |= {"datasets": [{str(files / "actor.json"): HALF}], "train_dataset_path": None, "batch_size": 4}
    trained(files, "whole", "ACTOR", **keys)
    whole = list(batches)
    batches.clear()
    on_log, count = StageCallback.on_log, [0]

    def interrupting(self, *args, **kwargs):
        count[0] += 1
        if count[0] == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return on_log(self, *args, **kwargs)

    monkeypatch.setattr(StageCallback, "on_log", interrupting)
    with pytest.raises(Interrupted):
        trained(files, "resumed", "ACTOR", **keys)
    assert 0 < len(batches) < len(whole)
    trained(files, "resumed", "ACTOR", resume=True, **keys)
    assert batches == whole
    resumed, undisturbed = (files / name / "actor" / "model.safetensors" for name in ("resumed", "whole"))
    assert resumed.read_bytes() == undisturbed.read_bytes()


def test_a_score_counts_as_often_as_it_is_seen(files):
    for name, score in (("low", 0), ("high", 4)):
        rows = [{"user_input": f"{name} {i}", "completion": "no", "score": score} for i in range(8)]
        (files / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    datasets = [{str(files / "low.json"): {"weight": 3, "val_split": 0}}, {str(files / "high.json"): {"val_split": 0}}]
    trained(files, "run", "REWARD", datasets=datasets, train_dataset_path=None, epochs=1)
    assert load_reward_model(files / "run" / "reward").model.shift == 1.0


def test_so_does_a_pair_where_scores_are_centred(files):
    for name, good in (("few", "well"), ("often", "hello there")):
        rows = [{"user_input": f"{name} {i}", "chosen": good, "rejected": "no"} for i in range(8)]
        (files / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    datasets = [{str(files / "often.json"): {"weight": 3, "val_split": 0}}, {str(files / "few.json"): {"val_split": 0}}]
    trained(files, "run", "REWARD", datasets=datasets, train_dataset_path=None, epochs=1)
    reward = load_reward_model(files / "run" / "reward")

    def mean(name: str, good: str) -> float:
        prompts = [f"{name} {i}" for i in range(8)]
        scores = [*reward.score(prompts, [good] * 8), *reward.score(prompts, ["no"] * 8)]
        return float(sum(scores)) / 16

    often, few = mean("often", "hello there"), mean("few", "well")
    assert abs(often - few) > 0.01
    assert (3 * often + few) / 4 == pytest.approx(0, abs=1e-4)


def test_every_epoch_of_rl_has_prompts_of_its_own(files, monkeypatch):
    seen: list[str] = []
    batch = PromptSchedule.batch

    def catching(self, step):
        made = batch(self, step)
        seen.extend(made.texts)
        return made

    monkeypatch.setattr(PromptSchedule, "batch", catching)
    made = settings(files) | {"output_dir": str(files / "run")}
    del made["trainer_config"]["examples_path"]
    made["trainer_config"]["datasets"] = [{str(files / "actor.json"): {"size": 12, "weight": 2, "val_split": 0}}]
    run(load_config(made), type="RL", reward_fn=length)
    first, second = Counter(seen[:24]), Counter(seen[24:])
    assert set(first.values()) == set(second.values()) == {2} and not set(first) & set(second)
