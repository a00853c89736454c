"""Mixtures of experts: adapters on parameters that are in one module, and the router's logits."""

from __future__ import annotations

import pytest
import torch
from families import CAUSAL
from transformers import AutoConfig, AutoModelForCausalLM, MixtralForCausalLM

from chatrlhf.config.model import PeftConfig
from chatrlhf.models.loading.lora import add_adapters, merged_parameters
from chatrlhf.models.loading.pretrained import leave_router_logits, read_model_config
from chatrlhf.models.weight_sharing import copy_without_adapters, merged_copy

IDS = torch.arange(2, 14).view(2, 6)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def adapted() -> tuple[MixtralForCausalLM, torch.Tensor]:
    """A model with adapters on its experts that change what it says, and what it said without."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CAUSAL["Mixtral"])
    before = logits(model)
    add_adapters(model, PeftConfig(r=2, lora_alpha=6, lora_dropout=0, target_modules="all"), "nowhere")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    assert any("experts.base_layer.lora_A" in name for name, _ in model.named_parameters())  # one around the other
    assert (logits(model) - before).abs().max() > 0.1
    return model, before


def test_a_bare_copy_has_none_on_its_experts(adapted):
    model, before = adapted
    bare = copy_without_adapters(model)
    assert not any("lora_" in name or "base_layer" in name for name in bare.state_dict())
    torch.testing.assert_close(logits(bare), before)


def test_a_whole_copy_has_what_they_add(adapted):
    model, _ = adapted
    torch.testing.assert_close(logits(merged_copy(model)), logits(model), rtol=1e-4, atol=1e-4)


def test_merged_parameters_have_the_names_and_values_of_a_model_without(adapted):
    model, _ = adapted
    fresh = AutoModelForCausalLM.from_config(CAUSAL["Mixtral"])
    fresh.load_state_dict(dict(merged_parameters(model)))
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-4)


def test_router_logits_are_given_to_nobody(tmp_path):
    settings = AutoConfig.for_model("mixtral", output_router_logits=True)
    settings.save_pretrained(tmp_path)
    assert read_model_config(str(tmp_path), "actor_config.model").output_router_logits is False
    plain = AutoConfig.for_model("llama")
    leave_router_logits(plain)
    assert not hasattr(plain, "output_router_logits")
