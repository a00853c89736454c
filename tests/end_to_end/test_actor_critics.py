"""Actor-critics by their keys: what a run trains, shares, saves and resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import differences, left_behind, length, read_manifest, settings, write_config
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.cli import main
from chatrlhf.data.templates import Template
from chatrlhf.models.frozen_trunk import BranchReference, FrozenTrunk
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.weight_sharing import copy_without_adapters
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rl.update import Updater


def improved(files: Path, sft: Path, changes: dict):
    """The RL stage behind that actor."""
    short = {"trainer_config.total_episodes": 16, "trainer_config.eval_interval": None, "output_dir": str(sft)}
    return run(load_config(settings(files), short | changes), type="RL", reward_fn=length).stages["RL"]


@pytest.fixture
def actor_critics(monkeypatch) -> list:
    """The actor-critics that are updated."""
    seen = []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.actor_critic) or step(self, *args))
    return seen


# ----- frozen trunk


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic_config.model": "shared"},
        {"critic_config.model": "shared", "trainer_config.precision": "bf16"},
        {"trainer_config.algorithm": "grpo", "trainer_config.samples_per_prompt": 2},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "separate",
)
def test_only_the_top_block_is_trained(files, sft, actor_critics, changes, capsys):
    stage = improved(files, sft, {"trainer_config.num_layers_unfrozen": 1} | changes)
    assert "all but the top 1 blocks are frozen and shared" in capsys.readouterr().out
    assert all(isinstance(made, FrozenTrunk) for made in actor_critics)
    before, after = load_file(sft / "actor" / "model.safetensors"), load_file(stage.checkpoint / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    # The tiny model ties its embeddings.
    assert moved == {name for name in before if "layers.1." in name} | {"model.norm.weight"}
    AutoModelForCausalLM.from_pretrained(stage.checkpoint)
    bf16 = "trainer_config.precision" in changes
    assert stage.metrics["ppo/first_ratio_error"] < (0.1 if bf16 else 1e-5)
    if "trainer_config.algorithm" not in changes:
        critic = load_file(sft / "critic" / "model.safetensors")
        assert AutoModel.from_pretrained(sft / "critic").config.num_hidden_layers == 2
        assert isinstance(load_reward_model(sft / "critic")(["hello"], ["well"])[0], float)
        lower = [name for name in critic if "layers.0." in name]
        assert lower and all(torch.equal(critic[name], before[f"model.{name}"]) for name in lower)


def test_a_trained_trunk_policy_is_told_from_its_reference(files, sft, monkeypatch):
    """The KL in the metrics is measured against the branch: 0 at a learning rate of 0, and more behind a step."""
    seen = []
    logprobs = BranchReference.logprobs
    monkeypatch.setattr(BranchReference, "logprobs", lambda self, s: seen.append(s) or logprobs(self, s))
    changes = {"trainer_config.num_layers_unfrozen": 1, "trainer_config.validation_fraction": 0}
    still = improved(files, sft, changes | {"trainer_config.actor_lr": 0})
    assert abs(still.metrics["kl/ref"]) < 1e-5
    assert seen and all(each.trunk_states is not None for each in seen)
    moved = improved(files, sft, changes | {"trainer_config.actor_lr": 1e-2})
    assert abs(moved.metrics["kl/ref"]) > 1e-2


@pytest.mark.parametrize("other", [-1, 2])
def test_a_checkpoint_of_another_cut_is_refused(files, sft, capsys, other):
    # A head on the trunk: then the two cuts have parameters of the same names and shapes.
    config = write_config(files, reward_config__reward_fn="small_run:length", critic_config__model="shared")
    improved(files, sft, {"trainer_config.num_layers_unfrozen": 1, "critic_config.model": "shared"})
    manifest = sft / "manifest.json"
    state = read_manifest(sft)
    state["stages"]["RL"]["status"] = "open"
    manifest.write_text(json.dumps(state))
    capsys.readouterr()
    words = ["--type", "RL", "--resume", "--set", f"trainer_config.num_layers_unfrozen={other}"]
    assert main([str(config), "--output-dir", str(sft), *words]) == 2
    line = capsys.readouterr().err
    assert f"trainer_config.num_layers_unfrozen: 1 -> {other} cannot change, RL was begun with it" in line


@pytest.mark.parametrize(
    "value, said", [(3, "num_layers_unfrozen: 3 is more than the 2 blocks of the actor"), (0, "num_layers_unfrozen: 0")]
)
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_cuts_that_cannot_be_are_refused_before_anything_starts(files, tmp_path, capsys, value, said, words):
    config = write_config(files)
    words = [*words, "--set", f"trainer_config.num_layers_unfrozen={value}", "--output-dir", str(tmp_path / "run")]
    assert main([str(config), *words]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ----- adapters


ADAPTERS = {"actor_config.peft_enable": True}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"critic_config.model": "shared"},
        {"critic_config.model": "shared", "trainer_config.precision": "bf16"},
        {"trainer_config.algorithm": "rloo", "trainer_config.samples_per_prompt": 2},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "separate",
)
def test_adapters_are_trained_upon_the_fine_tuned_actor(files, sft, actor_critics, changes, capsys):
    """From the key to the tensors of the policy and its reference, the metric, and what is left on disk."""
    stage = improved(files, sft, ADAPTERS | {"trainer_config.actor_lr": 3e-2} | changes)
    actor = AutoModelForCausalLM.from_pretrained(sft / "actor").eval()
    assert "its reference is built on the same weights" in capsys.readouterr().out
    made = actor_critics[-1]
    trained = {name for name, p in made.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    ids = torch.arange(2, 30)[None]
    bf16 = "trainer_config.precision" in changes
    prepare_models([], [actor], "bf16" if bf16 else "fp32", torch.device("cpu"))
    with torch.no_grad():
        want = actor(input_ids=ids).logits
        assert torch.equal(copy_without_adapters(made.policy)(input_ids=ids).logits, want)
        now = made.policy(input_ids=ids).logits
        assert (now - want).abs().max() > 1e-2
        # peft's own format, the fine-tuned actor as its base
        assert sorted(path.name for path in stage.checkpoint.glob("*.safetensors")) == ["adapter_model.safetensors"]
        assert base_of(str(stage.checkpoint)) == str((sft / "actor").resolve())
        loaded = AutoModelForCausalLM.from_pretrained(stage.checkpoint, dtype=want.dtype).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, now, rtol=0, atol=0.05 if bf16 else 1e-5)
    assert len(AutoTokenizer.from_pretrained(stage.checkpoint)) == now.shape[-1]
    assert Template.load(stage.checkpoint) is not None
    assert stage.metrics["ppo/first_ratio_error"] < (0.1 if bf16 else 1e-5)
    assert abs(stage.metrics["kl/ref"]) > 1e-3
    if "trainer_config.algorithm" not in changes:
        critic = AutoModel.from_pretrained(sft / "critic", dtype=torch.float32)
        shared = "critic_config.model" in changes
        assert any("lora_" in name for name, _ in critic.named_parameters()) == shared
        scorer = load_reward_model(sft / "critic")
        assert isinstance(scorer(["hello"], ["well"])[0], float)
        with torch.no_grad():
            backbone, _ = made.value_function()
            want = backbone(input_ids=ids).last_hidden_state.float()
            got = scorer.model.backbone(input_ids=ids).last_hidden_state
        torch.testing.assert_close(got, want, rtol=0, atol=0.1 if bf16 else 1e-4)


def test_a_checkpoint_of_adapters_leaves_the_base_out(files, sft):
    improved(files, sft, ADAPTERS | {"critic_config.model": "shared"})
    newest = sorted((sft / "checkpoints" / "RL").glob("step-*"))[-1]
    names = load_file(newest / "model.safetensors").keys()
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or name.startswith("value_head") for name in names)


def test_a_run_that_starts_from_saved_adapters_starts_from_their_sum(files, sft, tmp_path):
    """`actor_config.model` may name a folder of adapters: they are merged, and the next stage is an ordinary one."""
    improved(files, sft, ADAPTERS | {"trainer_config.actor_lr": 3e-2})
    changes = {"actor_config.model": str(sft / "actor_rl"), "trainer_config.actor_lr": 0, "output_dir": str(tmp_path)}
    stage = improved(files, tmp_path, changes)
    first = AutoModelForCausalLM.from_pretrained(sft / "actor_rl").eval()
    second = AutoModelForCausalLM.from_pretrained(stage.checkpoint).eval()
    assert (stage.checkpoint / "model.safetensors").exists()
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(second(input_ids=ids).logits, first(input_ids=ids).logits, rtol=0, atol=1e-5)
    learned = improved(files, tmp_path / "on", changes | {"trainer_config.actor_lr": 1e-3})
    third = AutoModelForCausalLM.from_pretrained(learned.checkpoint)
    start = dict(second.named_parameters())
    assert not any(torch.equal(weight, start[name]) for name, weight in third.named_parameters())


@pytest.mark.parametrize(
    "words, said",
    [
        (["--type", "ALL"], "those of 'tiny' are created on the fly; name a model"),
        (["--type", "ACTOR"], "those of 'tiny' are created on the fly; name a model"),
        (["--type", "RL"], "run --type ACTOR with peft_enable: False before"),
        (["--type", "RL", "--set", "actor_config.peft_config_path=no.yaml"], "file 'no.yaml' does not exist"),
        (["--type", "RL", "--set", "trainer_config.num_layers_unfrozen=1"], "both choose what is trained"),
        (
            ["--type", "RL", "--set", "actor_config.peft_enable=False", "--set", "critic_config.peft_enable=True"],
            "critic_config.peft_enable: adapters are saved without",
        ),
    ],
)
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_adapters_that_cannot_be_are_refused_before_anything_starts(files, tmp_path, capsys, words, said, dry):
    config = write_config(files, actor_config__peft_enable=True, reward_config__reward_fn="small_run:length")
    assert main([str(config), "--output-dir", str(tmp_path / "run"), *words, *dry]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_adapters_upon_adapters_are_refused(files, sft, tmp_path, capsys):
    improved(files, sft, ADAPTERS)
    config = write_config(files, actor_config__peft_enable=True, reward_config__reward_fn="small_run:length")
    words = [
        "--type",
        "ACTOR",
        "--set",
        f"actor_config.model={sft / 'actor_rl'}",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main([str(config), *words]) == 2
    assert "actor_rl holds adapters itself" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, said",
    [
        (["trainer_config.num_layers_unfrozen=1"], "RL: trains the top 1 of 2 blocks"),
        (["actor_config.peft_enable=True"], "RL: trains adapters of rank 8"),
    ],
)
def test_the_plan_says_what_is_trained(files, sft, capsys, words, said):
    config = write_config(files, reward_config__reward_fn="small_run:length")
    assert main([str(config), "--output-dir", str(sft), "--type", "RL", "--dry-run", "--set", *words]) == 0
    assert said in capsys.readouterr().out.split("# plan")[1]


# ----- resumed


class Killed(BaseException):
    """As if the power had gone: no one catches it."""


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer_config.num_layers_unfrozen": 1},
        {"trainer_config.num_layers_unfrozen": 1, "critic_config.model": "shared", "trainer_config.precision": "bf16"},
        ADAPTERS | {"trainer_config.precision": "bf16"},
        ADAPTERS | {"critic_config.model": "shared"},
    ],
    ids=["trunk", "trunk bf16", "adapters bf16", "adapters"],
)
def test_a_run_that_died_inside_an_epoch_resumes_to_the_same_bytes(files, fine_tuned, tmp_path, monkeypatch, changes):
    whole, killed = (shutil.copytree(fine_tuned, tmp_path / name / "run") for name in ("whole", "killed"))

    def go(run_dir: Path, resume: bool = False) -> None:
        monkeypatch.chdir(run_dir.parent)
        config = load_config(settings(files), changes | {"output_dir": "run"})
        run(config, type="RL", reward_fn=length, resume=resume)

    go(whole)
    step, calls = Updater.step, []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 15:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(Updater, "step", dying)
        go(killed)
    assert not (killed / "actor_rl").exists() and list((killed / "checkpoints" / "RL").glob("step-*"))
    go(killed, resume=True)
    found = [left_behind(run_dir) for run_dir in (killed, whole)]
    assert any(name.startswith("actor_rl/") for name in found[0]) and any(
        name.startswith("critic/") for name in found[0]
    )
    assert differences(*found) == []
