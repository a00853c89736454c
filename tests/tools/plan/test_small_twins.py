"""A plan has the kernels that a run would have: each is tried on a small module of its kind."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Olmo2Config, Qwen2Config

from chatrlhf.config.model import PeftConfig, QuantizationKeys
from chatrlhf.models.kernels.rms_norm import patch_rms_norms
from chatrlhf.models.kernels.swiglu import patch_swiglu
from chatrlhf.models.loading.lora import add_adapters
from chatrlhf.tools.plan.fake_run import FakeDevice
from chatrlhf.tools.plan.quantized_linear import quantize_linears
from chatrlhf.tools.plan.small_twins import small_twins_match

CPU = torch.device("cpu")
SIZES = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=32,
)
KINDS = {
    "Llama": LlamaConfig(**SIZES),
    "Llama with another activation": LlamaConfig(**SIZES, hidden_act="gelu"),
    "Llama with biases": LlamaConfig(**SIZES, mlp_bias=True),
    "Qwen2": Qwen2Config(**SIZES),
    "OLMo 2, with norms of queries and keys": Olmo2Config(**SIZES),
    "Gemma, whose norms have 1 + weight": GemmaConfig(**SIZES, head_dim=12),
}


def replaced(model, *matches) -> list[str]:
    """Modules whose forward a kernel has taken over."""
    patch_rms_norms(model, CPU, *matches)
    patch_swiglu(model, CPU, *matches)
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def on_fake_tensors(config, change=lambda model: None):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        change(model)
    return FakeDevice("cpu").materialize(model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_decision_is_that_of_a_run(kind):
    real = replaced(AutoModelForCausalLM.from_config(KINDS[kind], dtype=torch.float32))
    assert replaced(on_fake_tensors(KINDS[kind]), small_twins_match) == real
    assert bool(real) == ("Gemma" not in kind)


def test_adapters_and_quantized_layers_are_tried_too():
    def adapters(model):
        add_adapters(model, PeftConfig(r=4, lora_alpha=8), "")

    def bits(model):
        quantize_linears(model, QuantizationKeys(load_in_4bit=True), torch.float32)

    whole = replaced(on_fake_tensors(KINDS["Llama"]), small_twins_match)
    for change in (adapters, bits):
        assert replaced(on_fake_tensors(KINDS["Llama"], change), small_twins_match) == whole


def test_the_module_itself_is_left_as_it_is():
    model = on_fake_tensors(KINDS["Llama"])
    before = {name: (id(each), each.shape) for name, each in model.named_parameters()}
    replaced(model, small_twins_match)
    assert {name: (id(each), each.shape) for name, each in model.named_parameters()} == before
