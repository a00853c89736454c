"""From nothing to an RL actor without a file made by hand: a small local model writes, judges and is asked for more."""

from __future__ import annotations

import pytest
import torch
from generating import script_main, written
from small_run import settings
from transformers import LlamaConfig, LlamaForCausalLM

from chatrlhf import load_config, run
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.inspect.validation import faults_in


@pytest.fixture
def writer(tmp_path):
    """A folder with a model of random weights, which writes a full stop now and then."""
    tokenizer = train_tokenizer(["A word, another word. And so on! Is it 0 1 2 3 4 5?"] * 4, 290)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=4096, **sizes, **ids))
    model.save_pretrained(tmp_path / "writer")
    tokenizer.save_pretrained(tmp_path / "writer")
    return "writer"


def test_data_actor_reward_and_rl_by_a_local_model(tmp_path, writer, one_thread, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a model says depends on the name by which it is asked

    def command(name, *words):
        arguments = [*map(str, words), "--model", writer, "--max_tokens", "48", "--concurrency", "20"]
        assert script_main(name)(arguments) == 0

    data = tmp_path / "data"
    command("generate_actor_dataset", "-n", 60, "-o", data, "--exchanges", 1)
    actor, reward = data / "actor_training_data.json", data / "actor_training_data_scored.json"
    command("generate_rewards", actor, "--calibrate", 5)
    command("extend_rlhf_dataset", "-n", 24, "-d", data)
    prompts = data / "rlhf_training_data.json"

    for path in (actor, reward, prompts):
        assert not list(faults_in(path, None, None))
        assert len(written(path)) >= 24
    scores = {row["score"] for row in written(reward)}
    assert scores <= {step / 2 for step in range(11)} and len(scores) > 3

    made = settings(tmp_path)
    made["actor_config"] |= {"train_dataset_path": str(actor), "over_length": "cut"}
    made["reward_config"] |= {"train_dataset_path": str(reward), "over_length": "cut"}
    made["trainer_config"] |= {"examples_path": str(prompts), "total_episodes": 16, "eval_interval": None}
    result = run(load_config(made | {"output_dir": str(tmp_path / "run")}))
    assert list(result.stages) == ["ACTOR", "REWARD", "RL"]
