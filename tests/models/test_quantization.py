"""Quantized weights: frozen, read back as what they are, and gradients that come through them."""

from __future__ import annotations

import pytest
import torch
from tiny import llama
from torch import nn

from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import ActorConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.for_stages import load_actor
from chatrlhf.models.loading.lora import with_adapters
from chatrlhf.models.loading.quantization import ready_for_adapters
from chatrlhf.models.loading.tokenizer import train_tokenizer

CPU = torch.device("cpu")
IDS = torch.randint(0, 258, (3, 16), generator=torch.Generator().manual_seed(0))
BITS = [
    {"load_in_4bit": True},
    {"load_in_4bit": True, "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_type": "fp4"},
    {"load_in_8bit": True},
]


@pytest.fixture
def loaded(tmp_path):
    """A quantized model, as the ACTOR stage trains it; adapters that add something."""

    def load(**keys):
        llama(vocab=258, width=64, intermediate_size=128).save_pretrained(tmp_path)
        train_tokenizer(["a"], 258).save_pretrained(tmp_path)
        config = ActorConfig(model=str(tmp_path), peft_enable=True, precision="fp32", **keys)
        model, _ = load_actor(config, [], CPU, "fp32")
        model = ready_for_adapters(model, config.gradient_checkpointing)
        model = with_adapters(model, PeftConfig(r=4, lora_alpha=12, lora_dropout=0, target_modules="all-linear"), "x")
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.copy_(0.1 * torch.randn_like(weight))
        return model

    return load


def whole(model: nn.Module) -> nn.Module:
    """The same with the weights that its quantized weights stand for: the slow twin."""
    import bitsandbytes as bnb
    import bitsandbytes.functional as bits

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, bnb.nn.Linear4bit):
                weight = bits.dequantize_4bit(child.weight.data, child.weight.quant_state)
            elif isinstance(child, bnb.nn.Linear8bitLt):
                scales = child.weight.SCB if child.weight.SCB is not None else child.state.SCB  # it moves once used
                weight = child.weight.data.float() * (scales / 127.0)[:, None]
            else:
                continue
            plain = nn.Linear(child.in_features, child.out_features, bias=False)
            plain.weight = nn.Parameter(weight.float().clone(), requires_grad=False)
            setattr(module, name, plain)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("keys", BITS, ids=str)
@pytest.mark.parametrize("looked_before", [False, True])
def test_gradients_come_through_as_through_the_weights_that_the_bits_stand_for(loaded, keys, looked_before):
    model = loaded(**keys)
    if looked_before:  # as a stage does that evaluates before its first step
        with torch.no_grad():
            model.eval()(input_ids=IDS)
    found = gradients(model.train())
    assert found and all(".lora_" in name for name in found)
    expected = gradients(whole(model).train())
    for name, grad in expected.items():
        assert grad.norm() > 0
        assert (found[name] - grad).norm() < 0.05 * grad.norm(), name


@pytest.mark.parametrize("keys", BITS, ids=str)
def test_weights_take_fewer_bytes_and_are_near_what_they_were(loaded, keys, tmp_path):
    from transformers import AutoModelForCausalLM

    model = loaded(**keys)
    original = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    values = original.model.layers[0].mlp.up_proj.weight
    assert layer.weight.numel() * layer.weight.element_size() == values.numel() * (1 if "load_in_8bit" in keys else 0.5)
    near = whole(model).get_base_model().model.layers[0].mlp.up_proj.base_layer.weight
    assert (near - values).abs().mean() < (0.01 if "load_in_8bit" in keys else 0.2) * values.abs().mean()


def test_activations_are_computed_again_through_few_bits(loaded):
    plain = gradients(loaded(load_in_4bit=True).train())
    again = loaded(load_in_4bit=True, gradient_checkpointing=True).train()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    for name, grad in gradients(again).items():
        torch.testing.assert_close(grad, plain[name])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"load_in_4bit": True}, "cannot be trained; set peft_enable to True"),
        ({"load_in_4bit": True, "load_in_8bit": True, "peft_enable": True}, "one of these sizes"),
    ],
)
def test_what_does_not_go_together(keys, message):
    with pytest.raises(ValueError, match=message):
        ActorConfig(model="a", **keys)


def test_a_missing_package_is_named(loaded, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"chatrlhf\[quantize\]"):
        loaded(load_in_4bit=True)
