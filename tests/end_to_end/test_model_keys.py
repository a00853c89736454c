"""Keys that say how a model is loaded and held, from YAML to what each stage's model has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_run import length, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.errors import ConfigError
from chatrlhf.models.kernels import VARIABLE
from chatrlhf.models.kernels.attention import NAME
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.update import Updater
from chatrlhf.stages import hf_trainer

SHORT = {"trainer_config.total_episodes": 16, "trainer_config.eval_interval": None}


@pytest.fixture
def actor_critics(monkeypatch) -> list:
    seen = []
    train = PPOTrainer.train
    monkeypatch.setattr(
        PPOTrainer, "train", lambda self, *args: seen.append(self.updater.actor_critic) or train(self, *args)
    )
    return seen


@pytest.fixture
def trained(monkeypatch) -> list:
    """Models of the stages on others' trainers."""
    seen = []
    usual = hf_trainer.run_trainer

    def run_trainer(make, model, *rest, **named):
        seen.append(model)
        return usual(make, model, *rest, **named)

    for stage in ("sft", "reward"):
        monkeypatch.setattr(f"chatrlhf.stages.{stage}.run_trainer", run_trainer)
    return seen


def config(files: Path, **changes):
    return load_config(settings(files), SHORT | {name.replace("__", "."): value for name, value in changes.items()})


def test_attention_is_the_one_that_is_named(files, sft, tmp_path, trained, actor_critics):
    keys = {f"{section}__attn_implementation": "eager" for section in ("actor_config", "reward_config")}
    run(config(files, output_dir=str(tmp_path / "run"), actor_config__model=str(sft / "actor"), **keys))
    sft_model, reward = trained
    assert sft_model.config._attn_implementation == reward.config._attn_implementation == "eager"
    assert actor_critics[-1].policy.config._attn_implementation == "eager"


def test_attention_of_nobodys_choice_is_this_packages_in_rl(files, sft, actor_critics):
    run(config(files, output_dir=str(sft)), type="RL", reward_fn=length)
    assert actor_critics[-1].policy.config._attn_implementation == NAME


@pytest.mark.parametrize("by", ["key", "environment"])
def test_without_kernels_models_are_transformers_own_and_learn_the_same(files, sft, actor_critics, monkeypatch, by):
    runs = {}
    for kernels in ("auto", "off"):
        if by == "environment":
            monkeypatch.setenv(VARIABLE, kernels)
        keys = {"trainer_config__model_kernels": kernels} if by == "key" else {}
        out = sft.parent / f"{by}-{kernels}"
        made = config(
            files, output_dir=str(out), actor_config__model=str(sft / "actor"), trainer_config__precision="fp32", **keys
        )
        run(made, type="RL", reward_fn=length)
        own = actor_critics[-1].policy
        assert (own.config._attn_implementation == NAME) == (kernels == "auto")
        assert any("forward" in vars(each) for each in own.modules()) == (kernels == "auto")
        lines = (out / "metrics.jsonl").read_text().splitlines()
        runs[kernels] = [json.loads(line) for line in lines if '"loss/policy"' in line]
    for auto, off in zip(runs["auto"][:2], runs["off"][:2], strict=True):
        for name in ("reward/mean", "kl/ref", "loss/value", "response/length", "ppo/approx_kl"):
            assert off[name] == pytest.approx(auto[name], rel=1e-3, abs=1e-5), name


def test_frozen_embeddings_stay_through_all_stages(files, sft, tmp_path):
    keys = {f"{section}__froze_embeddings": True for section in ("actor_config", "reward_config")}
    out = tmp_path / "run"
    run(config(files, output_dir=str(out), actor_config__model=str(sft / "actor"), **keys))
    models = [
        AutoModelForCausalLM.from_pretrained(folder) for folder in (sft / "actor", out / "actor", out / "actor_rl")
    ]
    rows = [model.get_input_embeddings().weight for model in models]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    blocks = [model.model.layers[0].mlp.up_proj.weight for model in models]
    assert not torch.equal(blocks[0], blocks[1]) and not torch.equal(blocks[1], blocks[2])
    reward = load_reward_model(out / "reward").model.backbone
    assert torch.equal(reward.get_input_embeddings().weight, rows[0])


def test_a_tokenizer_with_more_tokens_is_refused_or_given_rows(files, sft, tmp_path):
    bigger = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(sft / "actor")
    known = len(tokenizer)
    tokenizer.add_tokens(["<narrator>", "<listener>"])
    tokenizer.save_pretrained(bigger)
    keys = {"actor_config__model": str(sft / "actor"), "actor_config__tokenizer_path": str(bigger)}
    with pytest.raises(
        ConfigError, match=f"{known + 2} tokens but the model only {known} embeddings.*resize_embeddings"
    ):
        run(config(files, output_dir=str(tmp_path / "refused"), **keys), type="ACTOR")
    out = tmp_path / "run"
    run(config(files, output_dir=str(out), actor_config__resize_embeddings=True, **keys), reward_fn=length)
    for folder in ("actor", "actor_rl"):
        model = AutoModelForCausalLM.from_pretrained(out / folder)
        assert model.get_input_embeddings().num_embeddings == known + 2 == model.config.vocab_size
        assert len(AutoTokenizer.from_pretrained(out / folder)) == known + 2


@pytest.mark.parametrize(
    "changes", [{}, {"critic_config__model": "shared"}, {"trainer_config__num_layers_unfrozen": 1}]
)
def test_activations_computed_again_change_nothing_that_rl_learns(files, sft, monkeypatch, actor_critics, changes):
    stats = {}
    for again in (False, True):
        seen = stats.setdefault(again, [])
        step = Updater.step
        monkeypatch.setattr(
            Updater, "step", lambda self, *args, seen=seen, step=step: seen.append(made := step(self, *args)) or made
        )
        keys = {"trainer_config__gradient_checkpointing": again, "trainer_config__total_episodes": 8}
        run(config(files, output_dir=str(sft), **keys, **changes), type="RL", reward_fn=length)
        monkeypatch.setattr(Updater, "step", step)
        blocks = [block for each in actor_critics[-1].backbones() for block in each.base_model.layers]
        assert all(hasattr(block.forward, "__wrapped__") == again for block in blocks)
    assert len(stats[True]) == len(stats[False]) > 1
    for got, want in zip(stats[True], stats[False], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)


def test_noise_and_recomputation_in_the_reward_stage(files, tmp_path, trained):
    def losses(name: str, **keys) -> list[float]:
        changes = {f"reward_config__{key}": value for key, value in keys.items()}
        run(config(files, output_dir=str(tmp_path / name), reward_config__model="tiny", **changes), type="REWARD")
        assert trained[-1].backbone.is_gradient_checkpointing == keys.get("gradient_checkpointing", False)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [line["loss/train"] for line in lines if "loss/train" in line]

    usual = losses("usual")
    assert losses("again", gradient_checkpointing=True) == pytest.approx(usual, rel=1e-5)
    noisy = losses("noisy", neftune_noise_alpha=5.0)
    assert all(abs(a - b) > 1e-5 for a, b in zip(noisy, usual, strict=True))
