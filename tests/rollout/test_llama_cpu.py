"""Steps without a model's modules: the same numbers, for the models whose arithmetic is known, and only for those."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, engine, llama, prompts, qwen2, qwen3, same_responses
from transformers import LlamaForCausalLM, MistralConfig, MistralForCausalLM

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.kernels.attention import patch_attention
from chatrlhf.models.kernels.rms_norm import patch_rms_norms
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.rollout.kv_cache import BatchKVCache, make_cache
from chatrlhf.rollout.llama_cpu import LlamaStep, llama_step


def mistral() -> MistralForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = MistralConfig(
        vocab_size=24, num_key_value_heads=2, head_dim=8, sliding_window=None, initializer_range=0.3, **sizes
    )
    return MistralForCausalLM(config).eval()


def with_biases() -> LlamaForCausalLM:
    model = llama(attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # are made 0
            torch.nn.init.normal_(parameter, std=0.3)
    return model


KNOWN = {
    "llama": llama,
    "grouped": lambda: llama(num_attention_heads=4, num_key_value_heads=2),
    "tied": lambda: llama(tie_word_embeddings=True),
    "biases": with_biases,
    "few words": lambda: llama(vocab=3),
    "wide heads": lambda: llama(head_dim=12),
    "gelu": lambda: llama(hidden_act="gelu"),
    "stretched": lambda: llama(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0)),
    "yarn": lambda: llama(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=10000.0)),
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def told(model, step, tokens: int = 40) -> list[torch.Tensor]:
    """Logits behind three left-padded prompts and behind each of so many tokens, by a step or by the model itself."""
    batch, vocab = prompts([3, 1, 6]), model.config.vocab_size
    ids, mask = batch.input_ids % vocab, batch.attention_mask
    memory = BatchKVCache(make_cache(model.config), mask)
    positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    asked = dict(past_key_values=memory.cache, use_cache=True)
    found = [model(ids, mask.long(), positions, **asked).logits[:, -1]]
    place = positions[:, -1]
    for token in torch.randint(0, vocab, (tokens, 3), generator=torch.Generator().manual_seed(1)):
        place, shown = place + 1, memory.extend()
        if step is None:
            found.append(model(token[:, None], shown.long(), place[:, None], **asked).logits[:, -1])
        else:
            found.append(step(token, place, shown, memory.cache))
    return found


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KNOWN)
@torch.no_grad()
def test_a_step_gives_the_models_logits(kind, precision):
    model = KNOWN[kind]().to(precision)
    for name, parameter in model.named_parameters():
        if "norm" in name:  # are made 1
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    want = torch.stack(told(copy.deepcopy(model), None)).float()  # over two blocks of the memory
    step = llama_step(model)
    assert step is not None
    got = torch.stack(told(model, step)).float()
    off, size = (got - want).abs(), want.abs().max()
    # bfloat16 keeps eight bits, and the two ways round at other places.
    assert off.max() < (1e-5 if precision == torch.float32 else 0.08) * size
    assert off.mean() < (1e-6 if precision == torch.float32 else 0.008) * size


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama", "qwen2", "qwen3"}))
def test_other_families_are_asked_themselves(family):
    assert llama_step(FAMILIES[family]().eval()) is None


def test_a_model_that_was_changed_is_asked_itself():
    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert llama_step(adapted) is None
    assert llama_step(adapted.base_model.model) is None
    assert llama_step(llama().train()) is None  # dropout
    odd = llama()
    mlp = odd.model.layers[1].mlp
    mlp.forward = lambda states, usual=mlp.forward: 1.2 * usual(states)
    assert llama_step(odd) is None
    half = with_biases()
    half.model.layers[0].self_attn.k_proj.bias = None
    assert llama_step(half) is None


def test_weights_stay_the_models_own(tmp_path):
    """Moved behind each other, they are trained, copied and saved as before."""
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = llama_step(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with torch.no_grad():
        want, got = torch.stack(told(model, None)), torch.stack(told(model, step))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_weights_that_lie_elsewhere_are_noticed(untried):
    sampler, batch = engine(llama()), prompts([3, 1, 6])
    sampler.generate(batch, seed=0)
    first, other = sampler.direct, llama(seed=1)
    sampler.generate(batch, seed=1)
    assert sampler.direct is first
    for mine, theirs in zip(sampler.model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    assert same_responses(sampler.generate(batch, seed=2), engine(other).generate(batch, seed=2))
    assert sampler.direct is not first


def test_a_working_copy_is_followed():
    """bfloat16 weights, written anew behind each optimizer step and put aside while a checkpoint is saved."""
    model, batch = llama(), prompts([3, 1, 6])
    for prefer in (patch_attention, patch_rms_norms):
        prefer(model, torch.device("cpu"))
    masters = MasterWeights(model)
    sampler = engine(model)
    sampler.generate(batch, seed=0)
    step = sampler.direct
    with torch.no_grad():
        for master in masters._masters:
            master.mul_(1.0 + torch.rand_like(master))
    with masters.fp32_weights():
        pass
    masters.sync_working_copy()
    got = sampler.generate(batch, seed=1)
    assert sampler.direct is step is not None
    assert same_responses(got, engine(copy.deepcopy(model)).generate(batch, seed=1))


def test_lengthening_rotations_are_the_models_own_affair():
    """They keep frequencies that they have made while a long response was sampled."""
    model = llama(rope_parameters=dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0), max_position_embeddings=16)
    sampler = engine(model, SamplingDistribution(), max_new_tokens=40)
    rollout = sampler.generate(prompts([3, 1, 6]), seed=0)
    assert sampler.direct is None
    model(rollout.response_ids).logits.sum().backward()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_direct_steps_run_in_inference_mode(family, monkeypatch, untried):
    """Prompts that are read later on do not, though they come in between."""
    model, asked, stepped = FAMILIES[family]().eval(), [], []
    model.register_forward_pre_hook(lambda *_: asked.append(torch.is_inference_mode_enabled()))
    step = LlamaStep.__call__

    def watched(self, *args):
        stepped.append(torch.is_inference_mode_enabled())
        return step(self, *args)

    monkeypatch.setattr(LlamaStep, "__call__", watched)
    engine(model, SamplingDistribution(), chunk_size=2).generate(prompts([3, 2, 6, 2, 5]), seed=0)
    assert len(asked) >= 3 and not any(asked)
    assert all(stepped) and bool(stepped) == (family == "llama")


def test_what_a_rollout_makes_can_be_trained_on():
    """It runs in inference mode, whose tensors autograd refuses."""
    model, batch = llama(), prompts([3, 1, 6])
    sampler = engine(model, chunk_size=2)
    rollout = sampler.generate(batch, seed=0)
    assert isinstance(sampler.direct, LlamaStep)
    made = (rollout.response_ids, rollout.sampling_logprobs, rollout.response_mask, rollout.finished)
    assert not any(each.is_inference() for each in made)
    model(rollout.response_ids).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
