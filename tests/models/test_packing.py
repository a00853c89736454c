"""Rows packed into one stream: the same numbers and gradients as padded, for the tokens alone."""

from __future__ import annotations

import pytest
import torch
from families import CAUSAL as SMALL
from tiny import (
    BRANCHES,
    FAMILIES,
    PLAIN,
    VOCAB,
    assert_same_gradients,
    gpt2,
    gradients,
    llama,
    prompts,
    ragged_mask,
    rollout,
    take,
)
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from chatrlhf.models.actor_critic import SeparateCritic, SharedTrunk
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.kernels import attention as attention_module
from chatrlhf.models.kernels import packing
from chatrlhf.models.kernels.attention import patch_attention
from chatrlhf.models.kernels.packing import pack, supports_packing
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, join, response_logits, response_logprobs
from chatrlhf.models.weight_sharing import copy_sharing_frozen

CPU = torch.device("cpu")
PACKING = ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3", "gemma"]
PROMPTS, RESPONSES = [3, 1, 6, 4, 2, 5, 9, 2], [5, 2, 1, 7, 30, 4, 1, 3]


def mistral() -> MistralForCausalLM:
    """Sees the last 4 positions only."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, sliding_window=4)
    sizes |= dict(num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0)
    return MistralForCausalLM(MistralConfig(vocab_size=VOCAB, **sizes)).eval()


def grouped():
    """Four heads, two to a head of keys and values."""
    return FAMILIES["qwen2"](num_attention_heads=4, num_key_value_heads=2)


def ragged(device: str = "cpu") -> Sequences:
    batch = rollout(prompts(PROMPTS), RESPONSES)
    prompt = batch.prompts
    rows = prompt.input_ids, prompt.attention_mask, batch.response_ids, batch.response_mask
    return join(*(each.to(device) for each in rows))


def read(model, sequences: Sequences) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and gradients of a weighted sum of them."""
    model.zero_grad()
    logprobs, _ = response_logprobs(response_logits(model, sequences), sequences, PLAIN)
    weights = torch.linspace(0.5, 2.0, logprobs.numel(), device=logprobs.device).view_as(logprobs)
    (weights * logprobs).sum().backward()
    return logprobs.detach(), gradients(model)


def test_a_stream_by_hand(monkeypatch):
    monkeypatch.setattr(packing, "BUCKET", 2)
    monkeypatch.setattr(packing, "BLOCK", 4)
    stream = pack(torch.tensor([[5, 6, 7], [8, 0, 0], [9, 4, 0]]), ragged_mask([3, 1, 2]))
    # Six tokens and the one that every empty slot takes, in whole twos.
    assert stream.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert stream.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    segments = stream.inputs["segments"]
    assert (segments.rows, segments.width) == (3, 4)
    assert segments.slots.view(3, 4).tolist() == [[0, 1, 2, 7], [3, 7, 7, 7], [4, 5, 7, 7]]
    # Slot 3, the first empty one, stands for what belongs to no row.
    assert segments.tokens.tolist() == [0, 1, 2, 4, 8, 9, 3, 3]
    assert stream.positions_of.view(3, 3).tolist() == [[0, 1, 2], [3, 7, 7], [4, 5, 7]]


@pytest.mark.parametrize("lengths", [[9] * 20, [9, 8], [64]])
def test_nothing_is_packed_where_nothing_is_gained(lengths):
    mask = ragged_mask(lengths)
    assert pack(torch.ones_like(mask, dtype=torch.long), mask) is None


def test_which_families_pack():
    found = []
    for family, make in FAMILIES.items():
        model = make().eval()
        patch_attention(model, CPU)
        found += [family] if supports_packing(model.base_model) else []
    assert found == PACKING


def test_a_model_that_loses_the_segments_does_not_pack():
    model = AutoModelForCausalLM.from_config(SMALL["StableLM"]).train()
    patch_attention(model, CPU)
    assert not supports_packing(model.base_model) and model.base_model.training


@pytest.mark.parametrize("branch", BRANCHES)
@pytest.mark.parametrize("make", [*(FAMILIES[name] for name in PACKING), mistral, grouped])
def test_packed_is_padded(make, branch, monkeypatch):
    take(branch, monkeypatch)
    model, sequences = make().eval(), ragged()
    assert sequences.stream.inputs["input_ids"].shape[1] <= sequences.input_ids.numel() / 2
    want, want_gradients = read(model, sequences)
    patch_attention(model, CPU)
    assert supports_packing(model.base_model)
    calls = []
    model.base_model.register_forward_pre_hook(lambda _, __, given: calls.append(given), with_kwargs=True)
    got, got_gradients = read(model, sequences)
    assert "segments" in calls[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    some = [name for name in want_gradients if "k_proj.bias" not in name]  # 0 but for rounding
    assert_same_gradients({n: got_gradients[n] for n in some}, {n: want_gradients[n] for n in some})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("make", [*(FAMILIES[name] for name in PACKING), mistral, grouped])
def test_packed_is_padded_on_a_gpu(make):
    model, sequences = make().eval().cuda(), ragged("cuda")
    want, want_gradients = read(model, sequences)
    patch_attention(model, torch.device("cuda"))
    assert supports_packing(model.base_model)
    got, got_gradients = read(model, sequences)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    some = [name for name in want_gradients if "k_proj.bias" not in name]  # 0 but for rounding
    assert_same_gradients({n: got_gradients[n] for n in some}, {n: want_gradients[n] for n in some}, 1e-3)


@pytest.mark.parametrize("kind", [SharedTrunk, SeparateCritic])
def test_a_frozen_trunk_takes_packed_rows(kind):
    """States are captured in padded rows and used in a stream, by policy, critic and reference."""
    policy = llama(num_hidden_layers=3)
    freeze_trunk(policy, 1)
    head = ScalarHead(16)
    critic = () if kind is SharedTrunk else (copy_sharing_frozen(policy.base_model),)
    made = FrozenTrunk(kind(policy, *critic, head, PLAIN), 1)
    reference = made.reference()
    want, want_reference = made.evaluate(ragged()), reference.logprobs(ragged())
    (want.logprobs + want.values).sum().backward()
    want_gradients = gradients(made.inner)
    made.inner.zero_grad()
    for model in (*made.backbones(), reference.model):
        patch_attention(model, CPU)
    assert made.supports_packing
    sequences = ragged()
    sequences.trunk_states = made.trunk_states(sequences)
    got, got_reference = made.evaluate(sequences), reference.logprobs(sequences)
    (got.logprobs + got.values).sum().backward()
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.values, want.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(got_reference, want_reference, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(made.inner), want_gradients)


def test_a_model_that_mixes_rows_does_not_pack(monkeypatch):
    model = llama()
    patch_attention(model, CPU)
    usual = attention_module.attention
    monkeypatch.setitem(
        attention_module.AttentionInterface._global_mapping,
        attention_module.NAME,
        lambda *args, segments=None, **kwargs: usual(*args[:4], None, **kwargs),
    )
    assert not supports_packing(model.base_model)


def test_a_model_that_loses_positions_does_not_pack(monkeypatch):
    model = gpt2().eval()
    patch_attention(model, CPU)
    table = model.transformer.wpe
    usual = table.forward
    monkeypatch.setattr(table, "forward", lambda positions: usual(torch.arange(positions.shape[1])[None]))
    assert not supports_packing(model.base_model)
