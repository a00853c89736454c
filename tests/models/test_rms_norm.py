"""Norms in few passes: the same numbers and gradients as the models' own, and only where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import FAMILIES, assert_same_gradients, gradients, llama

from chatrlhf.models.kernels.rms_norm import patch_rms_norms, rms_norm

CPU = torch.device("cpu")
REPLACED = {"llama": 5, "qwen2": 5, "qwen3": 9}  # qwen3 normalizes queries and keys, too


def test_by_hand():
    # mean(9, 16) + 0.5 = 13, so (3, 4) / sqrt(13) by (1, 2)
    got = rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), 0.5)
    assert got.tolist()[0] == pytest.approx([3 / 13**0.5, 8 / 13**0.5])


def test_its_gradient_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    states, weight, given = (torch.randn(*size, generator=generator) for size in ((2, 3, 5), (5,), (2, 3, 5)))
    inputs = (states.requires_grad_(), weight.requires_grad_())
    plain = weight * states * (states.square().mean(dim=-1, keepdim=True) + 0.1).rsqrt()
    want = torch.autograd.grad(plain, inputs, given)
    got = torch.autograd.grad(rms_norm(*inputs, 0.1), inputs, given)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_stay_what_they_were(family):
    model = FAMILIES[family]().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    ids = torch.randint(2, 24, (3, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for _ in range(2):
        model.zero_grad()
        logits = model(input_ids=ids).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        found.append((logits.detach(), gradients(model)))
        patch_rms_norms(model, CPU)
    assert sum("forward" in vars(module) for module in model.modules()) == REPLACED.get(family, 0)
    (want, want_gradients), (got, got_gradients) = found
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    some = [name for name in want_gradients if "k_proj.bias" not in name]  # 0 but for rounding
    assert_same_gradients({n: got_gradients[n] for n in some}, {n: want_gradients[n] for n in some})


def test_a_copy_has_weights_of_its_own():
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    patch_rms_norms(model, CPU)
    before, other = model(input_ids=ids).logits, copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(other(input_ids=ids).logits, before)


def test_a_weight_that_is_replaced_is_the_one_that_counts():
    model, ids = llama(), torch.tensor([[3, 4, 5]])
    patch_rms_norms(model, CPU)
    before = model(input_ids=ids).logits
    model.model.norm.weight = torch.nn.Parameter(2 * model.model.norm.weight)
    torch.testing.assert_close(model(input_ids=ids).logits, 2 * before)


def test_in_bfloat16_it_is_as_close_to_float32_as_the_plain_way():
    exact, plain, ours = llama(width=64), llama(width=64).bfloat16(), llama(width=64).bfloat16()
    patch_rms_norms(ours, CPU)
    ids = torch.randint(2, 24, (8, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = exact(input_ids=ids).logits
        errors = [(model(input_ids=ids).logits.float() - want).square().mean().sqrt() for model in (ours, plain)]
    assert 0 < errors[0] < 1.1 * errors[1]
