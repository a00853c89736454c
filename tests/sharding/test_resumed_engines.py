"""DeepSpeed restores an optimizer's hyperparameters with its states: a resumed run has its own all the same."""

from __future__ import annotations

import json

import pytest
from resuming import configured, resumed, stop, write_case

pytestmark = pytest.mark.slow
CHANGED = {"betas": [0.5, 0.75], "weight_decay": 0.125}


def write_settings(folder, tree, stage: int, **more) -> None:
    settings = {"zero_optimization": {"stage": stage}, **more}
    (folder / "ds.json").write_text(json.dumps(settings))
    tree["actor_config"] |= {"deepspeed_enable": True, "deepspeed_config_path": str(folder / "ds.json")}


def has_changed(group) -> bool:
    return list(group["betas"]) == CHANGED["betas"] and group["weight_decay"] == CHANGED["weight_decay"]


def test_rl_over_engines(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    tree = write_case(tmp_path) | {"reward_config": {"reward_fn": f"judge_{tmp_path.name}:length"}}
    write_settings(tmp_path, tree, 3)
    stop(configured(tree), "RL", 3)
    changes = CHANGED | {"actor_lr": 0.5, "critic_lr": 0.25, "lr_scheduler": "linear", "warmup_steps": 0}
    trainer = resumed(configured(tree, **{f"trainer_config.{name}": value for name, value in changes.items()}), "RL")
    groups = [engine.model.optimizer.param_groups[0] for engine in trainer.updater.backend.sharded.engines]
    assert all(map(has_changed, groups))
    assert [group["lr"] for group in groups] == [0.25, 0.125]  # half of the steps are done


@pytest.mark.nightly
def test_a_stage_on_trl_with_deepspeeds_own_optimizer_and_schedule(tmp_path):
    tree = write_case(tmp_path)
    optimizer = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    scheduler = {"type": "WarmupCosineLR", "params": dict.fromkeys(("warmup_num_steps", "total_num_steps"), "auto")}
    write_settings(tmp_path, tree, 2, optimizer=optimizer, scheduler=scheduler)
    stop(configured(tree), "ACTOR", 3)
    changes = CHANGED | {"lr": 0.5}
    trainer = resumed(configured(tree, **{f"actor_config.{name}": value for name, value in changes.items()}), "ACTOR")
    (group,) = trainer.optimizer.param_groups
    assert has_changed(group) and 0.4 < group["lr"] < 0.5
