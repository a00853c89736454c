"""Keys of the ACTOR stage alone, each from the YAML file to the loss that it changes."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from small_run import settings
from transformers import AutoModelForCausalLM, modeling_utils

from chatrlhf import load_config, run
from chatrlhf.data.encoder import IGNORED, Encoder
from chatrlhf.data.records import read_demonstrations
from chatrlhf.data.templates import Template
from chatrlhf.models.loading.tokenizer import load_tokenizer


@pytest.fixture
def losses(files, tmp_path):
    """The ACTOR stage with a key set; returns the losses of its first step and of its held-out rows, and the folder."""

    def train(name: str, **actor):
        made = settings(files)
        made["actor_config"] |= {"lr": 0.0, "warmup_steps": 0, **actor}
        run(load_config(made | {"output_dir": str(tmp_path / name)}), type="ACTOR")
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        found = {}
        for line in lines:
            found = {**line, **found}  # the first of each
        return found["loss/train"], found.get("loss/eval"), tmp_path / name / "actor"

    return train


def by_hand(folder, rows, epsilon: float) -> float:
    """Mean over trained tokens of (1 - e) * -log p(label) + e * mean over the vocabulary of -log p."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encoder = Encoder.of(load_tokenizer(str(folder), "k"), Template.load(folder), 96)
    total, count = 0.0, 0
    for row in rows:
        ids, labels = encoder.actor_row(row, "completion")
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for place, label in enumerate(labels[1:]):
            if label != IGNORED:
                total += -(1 - epsilon) * logprobs[place, label].item() - epsilon * logprobs[place].mean().item()
                count += 1
    return total / count


def test_label_smoothing_spreads_a_share_of_each_label(files, losses):
    rows = read_demonstrations(files / "actor.json")
    everything = {"batch_size": 60, "validation_fraction": 0.0}  # in one step
    found = {}
    for epsilon in (0.0, 0.1):
        found[epsilon], _, folder = losses(f"smooth {epsilon}", label_smoothing=epsilon, **everything)
        assert found[epsilon] == pytest.approx(by_hand(folder, rows, epsilon), rel=1e-5)
    assert abs(found[0.1] - found[0.0]) > 3e-4


def test_noise_on_embeddings_is_there_in_training_alone(losses):
    plain, held_out, _ = losses("plain")
    noisy, held_out_as_well, _ = losses("noisy", neftune_noise_alpha=50.0)
    assert abs(noisy - plain) > 1e-3
    assert held_out_as_well == held_out


def test_activations_that_are_computed_again_change_nothing(losses, monkeypatch):
    calls = []
    original = modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint", lambda *a, **k: calls.append(1) or original(*a, **k))
    *_, plain = losses("plain", lr=3e-3)
    assert not calls
    *_, again = losses("again", lr=3e-3, gradient_checkpointing=True)
    assert calls
    first, second = (load_file(folder / "model.safetensors") for folder in (plain, again))
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-5)
