"""The same runs without a shell, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from small_run import settings
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import chatrlhf
from chatrlhf import load_config, load_reward_model, run
from chatrlhf.config import Config
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import Template


def configured(files: Path, run_dir: Path, **changes) -> Config:
    short = {"trainer_config.total_episodes": 16, "trainer_config.eval_interval": None, "output_dir": str(run_dir)}
    return load_config(settings(files), short | changes)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    return run(configured(files, tmp_path_factory.mktemp("whole") / "run"), type="ALL")


@pytest.mark.quick
def test_each_stage_gives_its_checkpoint_and_last_metrics(whole):
    assert list(whole.stages) == ["ACTOR", "REWARD", "RL"]
    for stage, folder in (("ACTOR", "actor"), ("REWARD", "reward"), ("RL", "actor_rl")):
        assert whole.stages[stage].checkpoint == whole.output_dir / folder
    metrics = whole.stages["RL"].metrics
    assert metrics.path == whole.output_dir / "metrics.jsonl"
    last = [json.loads(line) for line in metrics.path.read_text().splitlines()][-1]
    assert last["stage"] == "RL" and metrics["reward/mean"] == last["reward/mean"]
    assert "loss/eval" in whole.stages["ACTOR"].metrics and "reward/accuracy" in whole.stages["REWARD"].metrics


@pytest.mark.quick
def test_metrics_have_the_names_that_are_promised(whole):
    metrics = whole.stages["RL"].metrics
    promised = (
        "reward/mean reward/std kl/ref kl/coef loss/policy loss/value ppo/clipfrac ppo/approx_kl ppo/entropy "
        "response/length response/finished time/rollout time/score time/update tokens/s sampling/logprob_gap"
    )
    assert set(promised.split()) <= metrics.keys()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["actor", "actor_rl"])
def test_policies_load_with_transformers(whole, name):
    folder = whole.output_dir / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([Encoder(tokenizer, Template.load(folder), 96).prompt("hello there 1")])
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert (folder / "model.safetensors").exists()


@pytest.mark.quick
@pytest.mark.parametrize("name", ["reward", "critic"])
def test_reward_model_and_critic_load(whole, name):
    folder = whole.output_dir / name
    assert AutoModel.from_pretrained(folder).config.hidden_size == 32
    first = load_reward_model(folder)(["hello there 1"], ["well hello"])
    assert first == load_reward_model(folder)(["hello there 1"], ["well hello"]) and isinstance(first[0], float)


@pytest.mark.quick
def test_the_manifest_says_what_was_done(whole, files):
    manifest = json.loads((whole.output_dir / "manifest.json").read_text())
    assert {stage: entry["status"] for stage, entry in manifest["stages"].items()} == dict.fromkeys(
        whole.stages, "done"
    )
    assert list(manifest["stages"]["ACTOR"]["inputs"]) == [str(files / "actor.json")]
    assert manifest["seed"] == 5 and manifest["versions"]["torch"] == torch.__version__.split("+")[0] + (
        "+" + torch.__version__.split("+")[1] if "+" in torch.__version__ else ""
    )
    assert manifest["config"]["trainer_config"]["num_rollouts"] == 8


@pytest.mark.quick
def test_samples_are_recorded(whole):
    rows = [json.loads(line) for line in (whole.output_dir / "samples.jsonl").read_text().splitlines()]
    assert {"stage", "step", "prompt", "completion", "score"} <= rows[0].keys()


def test_a_reward_function_takes_the_reward_models_place(files, tmp_path, capsys):
    seen = []

    def length(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append((prompts, completions))
        return [float(len(completion)) for completion in completions]

    result = run(configured(files, tmp_path / "run"), type="ALL", reward_fn=length)
    assert list(result.stages) == ["ACTOR", "RL"]
    assert "REWARD: skipped, the reward is length" in capsys.readouterr().out
    texts = {row["user_input"] for row in json.loads((files / "prompts.json").read_text())}
    assert seen and all(set(prompts) <= texts and len(prompts) == len(completions) for prompts, completions in seen)


def test_rl_alone_starts_from_the_model_that_is_named(files, tmp_path, capsys):
    """As trlX users do: no fine-tuning first."""
    result = run(
        configured(files, tmp_path / "run"), type="RL", reward_fn=lambda prompts, completions: [1.0] * len(prompts)
    )
    assert "the policy starts from actor_config.model as it is" in capsys.readouterr().out
    assert (result.stages["RL"].checkpoint / "config.json").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"critic_config.model": "shared"},
        {"trainer_config.algorithm": "rloo"},
        {"trainer_config.algorithm": "grpo", "trainer_config.samples_per_prompt": 2},
        {"reward_config.train_dataset_path": "pairs.json", "reward_config.model_head_hidden_size": 16},
        {"trainer_config.scale_reward": "ref", "trainer_config.entropy_coef": 0.01, "trainer_config.precision": "bf16"},
        {"actor_config.froze_embeddings": True, "trainer_config.gen_kwargs.stop": ["e"]},
        {"reward_config.model": "tiny", "trainer_config.gen_kwargs.max_length": 40},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_the_main_settings_run_through(files, tmp_path, changes):
    if "reward_config.train_dataset_path" in changes:
        changes = changes | {"reward_config.train_dataset_path": str(files / "pairs.json")}
    result = run(configured(files, tmp_path / "run", **changes))
    metrics = result.stages["RL"].metrics
    assert torch.isfinite(torch.tensor([metrics["loss/policy"], metrics["reward/mean"], metrics["kl/ref"]])).all()
    # On the first minibatch of a rollout the policy is the one that sampled.
    assert metrics["ppo/first_ratio_error"] < (0.1 if "trainer_config.precision" in changes else 1e-5)


@pytest.mark.quick
def test_rl_changes_the_policy_and_not_the_reference(whole):
    before = AutoModelForCausalLM.from_pretrained(whole.output_dir / "actor").state_dict()
    after = AutoModelForCausalLM.from_pretrained(whole.output_dir / "actor_rl").state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.quick
def test_dry_run_prints_the_plan_and_writes_nothing(files, tmp_path, capsys):
    from chatrlhf.cli import main

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(files)))
    assert main([str(tmp_path / "config.yaml"), "--output-dir", str(tmp_path / "run"), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "48 episodes = 6 steps x 8 rollouts" in out and "24 optimizer steps in all" in out and "parameters" in out
    assert yaml.safe_load(out.split("# plan")[0])["trainer_config"]["num_rollouts"] == 8
    assert not (tmp_path / "run").exists()


def test_trackers_that_are_named_get_the_metrics(files, tmp_path):
    pytest.importorskip("tensorboard")
    run_dir = tmp_path / "run"
    run(configured(files, run_dir, trackers=["tensorboard"]), type="ACTOR")
    assert list((run_dir / "trackers").rglob("events.out.tfevents*"))


@pytest.mark.quick
def test_the_package_exports_its_api():
    assert {"load_config", "run", "load_reward_model"} <= set(chatrlhf.__all__)
