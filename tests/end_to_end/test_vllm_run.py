"""`rollout_backend: vllm` from the YAML to the metrics, with a stand-in for vLLM under TRL's code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_run import length, read_manifest, settings, write_config
from vllm_standin import installed, without_vllm

from chatrlhf import load_config, run
from chatrlhf.cli import main
from chatrlhf.rl.update import Updater
from chatrlhf.rollout.vllm import VllmSampler


def improved(files: Path, sft: Path, changes: dict, resume: bool = False):
    short = {"trainer_config.total_episodes": 16, "output_dir": str(sft)}
    return run(load_config(settings(files), short | changes), type="RL", reward_fn=length, resume=resume).stages["RL"]


def steps(stage) -> list[dict]:
    rows = [json.loads(line) for line in stage.metrics.path.read_text().splitlines()]
    return [row for row in rows if row["stage"] == "RL" and "reward/mean" in row]


BY_VLLM = {"trainer_config.rollout_backend": "vllm"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"actor_config.peft_enable": True, "critic_config.model": "shared"},
        {"trainer_config.algorithm": "grpo", "trainer_config.samples_per_prompt": 2},
        {"trainer_config.num_layers_unfrozen": 1, "trainer_config.precision": "bf16"},
        {"trainer_config.vllm.enable_sleep_mode": True, "trainer_config.gen_kwargs.stop": ["e"]},
    ],
    ids=["separate", "adapters", "grpo", "trunk bf16", "asleep, stop"],
)
def test_a_run_samples_with_vllm_and_logs_how_far_it_is_from_the_policy(files, sft, changes, monkeypatch):
    seen, kinds = [], []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.settings) or step(self, *args))
    generate = VllmSampler.generate
    monkeypatch.setattr(VllmSampler, "generate", lambda self, *args: kinds.append(self) or generate(self, *args))
    with installed():
        stage = improved(files, sft, BY_VLLM | {"trainer_config.actor_lr": 3e-3} | changes)
        import vllm

        (llm,) = vllm.LLM.started
        assert llm.given["model"] == str(sft / "actor") and llm.given["max_num_seqs"] == 8
    # The rollouts of both steps, the held-out prompts before the first and behind the last.
    assert len(kinds) == 4
    assert all(each.foreign_sampler and each.importance_cap == 2.0 for each in seen)
    logged = steps(stage)
    assert len(logged) == 2
    for row in logged:
        # The stand-in samples in bfloat16, as vLLM would.
        assert 0 < row["sampling/logprob_gap"] < row["sampling/logprob_gap_max"] < 0.3
        assert 0 <= row["sampling/truncated"] <= 1
    before = load_file(sft / "actor" / "model.safetensors")
    if "actor_config.peft_enable" not in changes:
        after = load_file(stage.checkpoint / "model.safetensors")
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_own_engine_is_as_near_as_rounding_and_is_not_weighed(files, sft, monkeypatch):
    seen = []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.settings) or step(self, *args))
    stage = improved(files, sft, {})
    assert not any(each.foreign_sampler for each in seen)
    for row in steps(stage):
        assert row["sampling/logprob_gap"] <= row["sampling/logprob_gap_max"] < 1e-5
        assert "sampling/truncated" not in row


def test_the_cap_reaches_the_update_and_cuts(files, sft, monkeypatch):
    seen = []
    step = Updater.step
    monkeypatch.setattr(Updater, "step", lambda self, *args: seen.append(self.settings) or step(self, *args))
    with installed():
        stage = improved(files, sft, BY_VLLM | {"trainer_config.importance_cap": 1.0})
    assert {each.importance_cap for each in seen} == {1.0}
    assert all(0.2 < row["sampling/truncated"] < 0.9 for row in steps(stage))


def test_a_run_by_vllm_is_resumed(files, sft):
    with installed():
        improved(files, sft, BY_VLLM)
        manifest = sft / "manifest.json"
        state = read_manifest(sft)
        state["stages"]["RL"]["status"] = "open"
        manifest.write_text(json.dumps(state))
        stage = improved(files, sft, BY_VLLM | {"trainer_config.total_episodes": 32}, resume=True)
    assert [row["step"] for row in steps(stage)] == [1, 2, 3, 4]


@without_vllm
@pytest.mark.parametrize("words", [[], ["--dry-run"]])
@pytest.mark.parametrize("stage", ["RL", "ALL"])
def test_without_vllm_nothing_starts(files, tmp_path, capsys, words, stage):
    config = write_config(files, trainer_config__rollout_backend="vllm", reward_config__reward_fn="small_run:length")
    assert main([str(config), "--type", stage, "--output-dir", str(tmp_path / "run"), *words]) == 2
    line = capsys.readouterr().err
    assert 'pip install "chatrlhf[vllm]"' in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "word, said",
    [
        ("trainer_config.rollout_backend=vlm", "trainer_config.rollout_backend"),
        ("trainer_config.vllm.mode=remote", "trainer_config.vllm.mode"),
        ("trainer_config.vllm.gpu_memory_utilisation=0.5", "did you mean 'trainer_config.vllm.gpu_memory_utilization'"),
        ("trainer_config.vllm.server_base_url=gpu:8000", "trainer_config.vllm.server_base_url: expected http://"),
        ("trainer_config.importance_cap=0", "trainer_config.importance_cap"),
        ("trainer_config.gen_kwargs.temperature=2.5", "'vllm' samples at temperatures from 0.01 to 2, got 2.5"),
        ("actor_config.temperature=0.001", "'vllm' samples at temperatures from 0.01 to 2, got 0.001"),
        ("trainer_config.gen_kwargs.top_k=5", "top_k: 5 is refused"),
    ],
)
def test_what_cannot_be_is_refused_by_name(files, tmp_path, capsys, word, said):
    config = write_config(files, trainer_config__rollout_backend="vllm", reward_config__reward_fn="small_run:length")
    words = ["--type", "RL", "--output-dir", str(tmp_path / "run"), "--set", word]
    with installed():
        assert main([str(config), *words]) == 2
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_policy_that_was_made_on_the_spot_is_refused(files, tmp_path, capsys):
    config = write_config(files, trainer_config__rollout_backend="vllm", reward_config__reward_fn="small_run:length")
    with installed():
        assert main([str(config), "--type", "RL", "--output-dir", str(tmp_path / "run")]) == 2
    assert "run --type ACTOR first" in capsys.readouterr().err
