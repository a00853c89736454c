"""Topologies by their keys: what a run trains, shares, saves and resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import differences, finish, left_behind, settings, start, write_config, write_files
from transformers import AutoModel, AutoModelForCausalLM

from chatrlhf import load_config, load_reward_model, run
from chatrlhf.cli import main
from chatrlhf.models.frozen_trunk import BranchReference, FrozenTrunk
from chatrlhf.rl.update import Updater


def length(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def sft(files, tmp_path_factory) -> Path:
    """A run whose actor has been fine-tuned."""
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    run(load_config(settings(files), {"output_dir": str(run_dir)}), type="ACTOR")
    return run_dir


def improved(files: Path, sft: Path, changes: dict):
    """The RL stage behind that actor."""
    short = {"trainer_config.total_episodes": 16, "trainer_config.eval_interval": None, "output_dir": str(sft)}
    return run(load_config(settings(files), short | changes), type="RL", reward_fn=length).stages["RL"]


@pytest.fixture
def topologies(monkeypatch) -> list:
    """The topologies that are updated."""
    seen = []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.topology) or step(self, *args))
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
def test_only_the_top_block_is_trained(files, sft, topologies, changes, capsys):
    stage = improved(files, sft, {"trainer_config.num_layers_unfrozen": 1} | changes)
    assert "all but the top 1 blocks are frozen and shared" in capsys.readouterr().out
    assert all(isinstance(made, FrozenTrunk) for made in topologies)
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


def test_a_trunks_run_resumes_to_the_same_bytes(files, tmp_path):
    config = write_config(files, trainer_config__num_layers_unfrozen=1, trainer_config__precision="bf16")
    die = """
import os, signal
import chatrlhf.rl.update as update
step, calls = update.Updater.step, [0]
def dying(self, *args):
    calls[0] += 1
    return os.kill(os.getpid(), signal.SIGKILL) if calls[0] == 15 else step(self, *args)
update.Updater.step = dying
"""
    for name, code in (("whole", None), ("killed", die)):
        status, _, err = finish(start(str(config), "--output-dir", str(tmp_path / name), code=code))
        assert (status == 0) == (code is None), err
    status, out, err = finish(start(str(config), "--output-dir", str(tmp_path / "killed"), "--resume"))
    assert status == 0 and "resumed from" in out, err
    assert differences(left_behind(tmp_path / "killed"), left_behind(tmp_path / "whole")) == []


@pytest.mark.parametrize("other", [-1, 2])
def test_a_checkpoint_of_another_cut_is_refused(files, sft, capsys, other):
    # A head on the trunk: then the two cuts have parameters of the same names and shapes.
    config = write_config(files, reward_config__reward_fn="builtins:len", critic_config__model="shared")
    improved(files, sft, {"trainer_config.num_layers_unfrozen": 1, "critic_config.model": "shared"})
    manifest = sft / "manifest.json"
    state = json.loads(manifest.read_text())
    state["stages"]["RL"]["status"] = "open"
    manifest.write_text(json.dumps(state))
    capsys.readouterr()
    words = ["--type", "RL", "--resume", "--set", f"trainer_config.num_layers_unfrozen={other}"]
    assert main([str(config), "--output-dir", str(sft), *words]) == 2
    line = capsys.readouterr().err
    assert "checkpoint of another model" in line and "num_layers_unfrozen" in line


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
