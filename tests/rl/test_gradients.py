"""Sums of gradients by hand: precision, what is not reached, clipping by group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from chatrlhf.rl.gradients import Gradients


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def left_with(weights: list[nn.Parameter], *gradients: list[float] | None) -> None:
    """What a backward would have done."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = None if gradient is None else torch.tensor(gradient, dtype=weight.dtype)


def made(group: list[nn.Parameter], *others: list[nn.Parameter]) -> Gradients:
    groups = [group, *others]
    return Gradients(groups, [each for group in groups for each in group])


def test_microbatches_add_up_and_a_new_minibatch_starts_from_nothing():
    group = parameters(2, 1)
    sums = made(group)
    for _ in range(2):
        sums.forget()
        left_with(group, [1.0, 2.0], [3.0])
        sums.collect()
        left_with(group, [10.0, 20.0], None)
        sums.collect()
        sums.finish()
        assert [each.grad.tolist() for each in group] == [[11.0, 22.0], [3.0]]


def test_what_bfloat16_would_lose_is_kept():
    masters, working_params = parameters(1), [nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))]
    sums = Gradients([masters], working_params)
    sums.forget()
    for gradient in (256.0, 1.0):  # 257 is no number of bfloat16's
        left_with(working_params, [gradient])
        sums.collect()
    sums.finish()
    assert masters[0].grad.tolist() == [257.0]
    assert masters[0].grad.dtype == torch.float32 and working_params[0].grad is None


def test_a_parameter_out_of_reach_has_no_gradient_and_counts_in_no_norm():
    group = parameters(2, 3)
    sums = made(group)
    sums.forget()
    left_with(group, [1.0, 1.0], [7.0, 7.0, 7.0])
    sums.collect()
    sums.forget()  # what is in the buffer from here on is of no meaning
    left_with(group, [3.0, 4.0], None)
    sums.collect()
    sums.finish()
    assert group[1].grad is None
    assert sums.clip(None)[0].item() == 5.0


def test_each_group_is_clipped_by_its_own_norm():
    policy, critic = parameters(1, 1), parameters(2)
    sums = made(policy, critic)
    sums.forget()
    left_with([*policy, *critic], [3.0], [4.0], [0.3, 0.4])
    sums.collect()
    sums.finish()
    norms = sums.clip(1.0)
    assert [norm.item() for norm in norms] == pytest.approx([5.0, 0.5])
    assert torch.cat([each.grad for each in policy]).tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert critic[0].grad.tolist() == pytest.approx([0.3, 0.4])  # short enough already


def test_between_updates_and_during_the_first_backward_nothing_is_held():
    group = parameters(2)
    sums = made(group)
    sums.forget()
    assert not sums.flat and not sums.views
    left_with(group, [1.0, 2.0])
    sums.collect()
    assert sums.flat
    sums.finish()
    sums.forget()
    assert group[0].grad is None and not sums.flat and not sums.views
    sums.forget()
    left_with(group, [5.0, 6.0])
    sums.collect()
    sums.finish()
    assert group[0].grad.tolist() == [5.0, 6.0]
