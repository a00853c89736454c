"""SwiGLU that keeps less: the same numbers and gradients as the models' own, and only where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, assert_same_gradients, gradients, llama

from chatrlhf.models.kernels import swiglu as swiglu_module
from chatrlhf.models.kernels.swiglu import patch_swiglu, swiglu

CPU = torch.device("cpu")
REPLACED = {"llama": 2, "qwen2": 2, "qwen3": 2}  # Gemma's gates are gelu


def read(model, ids) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and gradients of something that depends on all of them."""
    model.zero_grad()
    logits = model(input_ids=ids).logits
    logits.log_softmax(-1)[..., 3].sum().backward()
    return logits.detach(), gradients(model)


IDS = torch.randint(2, 24, (3, 12), generator=torch.Generator().manual_seed(0))


def test_by_hand():
    # silu(x) = x / (1 + e^-x), and silu(ln 3) = ln 3 * 3/4
    assert swiglu(torch.tensor([1.0986123]), torch.tensor([4.0])).item() == pytest.approx(3 * 1.0986123)


def test_its_gradient_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(swiglu, inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_stay_what_they_were(family):
    model = FAMILIES[family]().eval()
    want, want_gradients = read(model, IDS)
    patch_swiglu(model, CPU)
    got, got_gradients = read(model, IDS)
    assert sum("forward" in vars(module) for module in model.modules()) == REPLACED.get(family, 0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    some = [name for name in want_gradients if "k_proj.bias" not in name]  # 0 but for rounding
    assert_same_gradients({n: got_gradients[n] for n in some}, {n: want_gradients[n] for n in some})


def test_the_product_is_made_again_for_its_backward(monkeypatch):
    """And so it need not be kept, nor silu(gate): of four wide tensors gate and up are left."""
    model, made = llama(), []
    usual = swiglu_module.swiglu
    monkeypatch.setattr(swiglu_module, "swiglu", lambda *args: made.append(True) or usual(*args))
    patch_swiglu(model, CPU)
    made.clear()
    logits = model(input_ids=IDS).logits
    assert len(made) == 2  # two layers
    logits.sum().backward()
    assert len(made) == 4
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(made) == 6


def test_a_part_of_the_product_is_not_taken_for_the_whole():
    class Odd(torch.nn.Linear):
        def forward(self, mixed):
            first = mixed[:1]
            return super().forward(mixed) + super().forward(first * first)

    model = llama()
    for layer in model.model.layers:
        odd = Odd(32, 16, bias=False)
        layer.mlp.down_proj = odd
    want, want_gradients = read(model, IDS)
    patch_swiglu(model, CPU)
    assert sum("forward" in vars(module) for module in model.modules()) == 2
    got, got_gradients = read(model, IDS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert_same_gradients(got_gradients, want_gradients)


def test_adapters_learn_as_before():
    model = get_peft_model(llama(), LoraConfig(target_modules=["gate_proj", "down_proj"], lora_dropout=0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # is made 0
                torch.nn.init.normal_(parameter, std=0.3)
    want, want_gradients = read(model, IDS)
    patch_swiglu(model, CPU)
    assert sum("forward" in vars(module) for module in model.modules()) == 2
    got, got_gradients = read(model, IDS)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert len(want_gradients) == 8
    assert_same_gradients(got_gradients, want_gradients)


def test_a_copy_has_weights_of_its_own():
    model = llama()
    patch_swiglu(model, CPU)
    (want, _), other = read(model, IDS), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(read(other, IDS)[0], want)


def test_another_activation_stays():
    model = llama(hidden_act="gelu")
    patch_swiglu(model, CPU)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_gpu_keeps_its_own():
    model = llama()
    patch_swiglu(model, torch.device("cuda"))
    assert not any("forward" in vars(module) for module in model.modules())
