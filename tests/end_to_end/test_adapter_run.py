"""Adapters from the first stage on: trained by ACTOR, taken as they are for the reference, trained on by RL."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import length, settings
from transformers import AutoModel, AutoModelForCausalLM

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.errors import ConfigError
from chatrlhf.models.adapters import BASE_CONFIG, as_reference, base_of
from chatrlhf.rl.update import Updater
from chatrlhf.trainers.hf_stage import StageCallback

IDS = torch.arange(2, 30)[None]


@pytest.fixture
def base(sft, tmp_path) -> Path:
    """A model in its whole weights, somewhere else."""
    shutil.move(sft / "actor", tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def config(files, base, tmp_path):
    """Settings of a run of adapters upon the base, rates high enough for them to matter; with changes."""
    (tmp_path / "peft.yaml").write_text("r: 4\nlora_alpha: 12\nlora_dropout: 0.0\n")

    def made(name: str, **changes):
        here = {
            "output_dir": str(tmp_path / name),
            "actor_config.model": str(base),
            "actor_config.peft_enable": True,
            "actor_config.peft_config_path": str(tmp_path / "peft.yaml"),
            "actor_config.lr": 3e-2,
            "trainer_config.actor_lr": 3e-2,
            "trainer_config.total_episodes": 16,
            "trainer_config.eval_interval": None,
        }
        return load_config(settings(files), here | {name.replace("__", "."): value for name, value in changes.items()})

    return made


@pytest.fixture
def policies(monkeypatch) -> list:
    """The policies that are updated."""
    seen = []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.topology.policy) or step(self, *args))
    return seen


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(folder: Path) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic_config__model": "shared"},
        {"trainer_config__algorithm": "rloo", "trainer_config__samples_per_prompt": 2},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "separate critic",
)
def test_rl_goes_on_with_the_actors_adapters_and_is_held_to_them(config, base, tmp_path, policies, changes, capsys):
    result = run(config("run", **changes), reward_fn=length)
    out = capsys.readouterr().out
    assert "ACTOR: trains adapters alone" in out
    assert "is its own reference with those it has now" in out
    for folder in ("actor", "actor_rl"):
        path = tmp_path / "run" / folder
        assert [each.name for each in path.glob("*.safetensors")] == ["adapter_model.safetensors"]
        assert base_of(str(path)) == str(base.resolve())
        assert json.loads((path / "adapter_config.json").read_text())["r"] == 4
        assert not (path / "README.md").exists()
    start, sft, improved = loaded(base), loaded(tmp_path / "run" / "actor"), loaded(tmp_path / "run" / "actor_rl")
    assert (sft - start).abs().max() > 0.1 and (improved - sft).abs().max() > 0.01
    policy = policies[-1]
    torch.testing.assert_close(logits(policy), improved, rtol=0, atol=1e-5)
    with torch.no_grad(), as_reference(policy):
        torch.testing.assert_close(policy(input_ids=IDS).logits, sft, rtol=0, atol=1e-5)
    trained = [name for name, weight in policy.named_parameters() if weight.requires_grad]
    assert trained and all(".lora_" in name and ".default." in name for name in trained)
    metrics = result.stages["RL"].metrics
    assert metrics["ppo/first_ratio_error"] < 1e-5
    names = load_file(sorted((tmp_path / "run" / "checkpoints" / "RL").glob("step-*"))[-1] / "model.safetensors").keys()
    assert any(".lora_A.default" in name for name in names) and not any(".reference." in name for name in names)


def test_a_fresh_policy_is_its_reference(config, tmp_path, policies):
    result = run(config("run", trainer_config__actor_lr=0), reward_fn=length)
    assert abs(result.stages["RL"].metrics["kl/ref"]) < 1e-4
    torch.testing.assert_close(loaded(tmp_path / "run" / "actor_rl"), loaded(tmp_path / "run" / "actor"))


def test_a_critic_that_is_a_copy_of_the_policy_is_the_fine_tuned_one_whole(config, tmp_path):
    run(config("run", trainer_config__critic_lr=0), reward_fn=length)
    critic = AutoModel.from_pretrained(tmp_path / "run" / "critic", dtype=torch.float32).eval()
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "actor", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (model(input_ids=IDS).last_hidden_state for model in (actor.base_model, critic))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_reward_model_of_the_actor_starts_from_what_it_computes(config, files, tmp_path):
    run(config("run", reward_config__lr=0))
    reward = load_reward_model(tmp_path / "run" / "reward").model.backbone
    actor = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "actor", dtype=torch.float32).eval()
    with torch.no_grad():
        want, got = (model(input_ids=IDS).last_hidden_state for model in (actor.base_model, reward))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_without_peft_rl_trains_what_base_and_adapters_are_together(config, tmp_path):
    run(config("run"), type="ACTOR")
    changes = {"actor_config__peft_enable": False, "trainer_config__actor_lr": 0}
    stage = run(config("run", **changes), type="RL", reward_fn=length).stages["RL"]
    assert (stage.checkpoint / "model.safetensors").exists()
    torch.testing.assert_close(loaded(stage.checkpoint), loaded(tmp_path / "run" / "actor"), rtol=0, atol=1e-5)


def test_rl_goes_on_with_adapters_that_somebody_names(config, tmp_path, policies):
    run(config("first"), type="ACTOR")
    here = str(tmp_path / "first" / "actor")
    stage = run(config("second", actor_config__model=here), type="RL", reward_fn=length).stages["RL"]
    with torch.no_grad(), as_reference(policies[-1]):
        torch.testing.assert_close(policies[-1](input_ids=IDS).logits, loaded(Path(here)), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(policies[-1]), loaded(stage.checkpoint), rtol=0, atol=1e-5)


def test_the_actor_stage_is_resumed_with_its_adapters(config, tmp_path, monkeypatch):
    run(config("whole"), type="ACTOR")
    step_end = StageCallback.on_step_end

    def dies(self, args, state, control, **rest):
        if state.global_step == 5:
            raise MemoryError("no more")
        return step_end(self, args, state, control, **rest)

    monkeypatch.setattr(StageCallback, "on_step_end", dies)
    with pytest.raises(MemoryError):
        run(config("parts"), type="ACTOR")
    monkeypatch.setattr(StageCallback, "on_step_end", step_end)
    run(config("parts"), type="ACTOR", resume=True)
    name = Path("actor") / "adapter_model.safetensors"
    whole, parts = load_file(tmp_path / "whole" / name), load_file(tmp_path / "parts" / name)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_stretched_positions_are_kept_beside_the_adapters(config, tmp_path, policies):
    run(config("run", actor_config__rope_scaling={"type": "linear", "factor": 2}), reward_fn=length)
    for folder in ("actor", "actor_rl"):
        saved = json.loads((tmp_path / "run" / folder / BASE_CONFIG).read_text())
        assert saved["rope_parameters"]["factor"] == 2.0
    assert policies[-1].config.rope_parameters["factor"] == 2.0


def test_adapters_upon_four_bits_learn_and_rl_goes_on_upon_whole_weights(config, base, tmp_path, policies):
    bits = {"actor_config__load_in_4bit": True, "actor_config__bnb_4bit_use_double_quant": True}
    with pytest.raises(ConfigError, match="in the ACTOR stage alone"):
        run(config("run", **bits), reward_fn=length)
    assert not (tmp_path / "run").exists()
    result = run(config("run", **bits, actor_config__epochs=4, actor_config__lr=5e-3), type="ACTOR").stages["ACTOR"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss/eval"] for line in lines if "loss/eval" in line]
    assert held_out[-1] < held_out[0] - 0.01  # the base is too small to learn much
    assert [each.name for each in result.checkpoint.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert base_of(str(result.checkpoint)) == str(base.resolve())
    run(config("run"), type="RL", reward_fn=length)
    with torch.no_grad(), as_reference(policies[-1]):
        reference = policies[-1](input_ids=IDS).logits
    torch.testing.assert_close(reference, loaded(result.checkpoint), rtol=0, atol=1e-5)
