"""Importance weights by hand, and that they turn another sampler's draws into the policy's."""

import math

import pytest
import torch

from chatrlhf.functional.importance import importance_weights, logprob_gap
from chatrlhf.functional.losses import policy_loss


def log(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows).log()


def test_weights_by_hand():
    # policy / sampler: 0.4 / 0.2 = 2, 0.1 / 0.2 = 0.5, 0.9 / 0.1 = 9 which is cut to 3; the last place is masked
    old, sampling = log([0.4, 0.1, 0.9, 1.0]), log([0.2, 0.2, 0.1, 1.0])
    assert importance_weights(old, sampling, 3.0)[0].tolist() == pytest.approx([2.0, 0.5, 3.0, 1.0])
    assert importance_weights(old, sampling, None)[0].tolist() == pytest.approx([2.0, 0.5, 9.0, 1.0])


def test_weights_are_constants_of_the_loss():
    old, sampling = log([0.4]).requires_grad_(), log([0.2]).requires_grad_()
    assert not importance_weights(old, sampling, None).requires_grad


def test_a_cap_of_1_never_raises_a_weight():
    old, sampling = torch.randn(3, 5), torch.randn(3, 5)
    weights = importance_weights(old, sampling, 1.0)
    assert (weights <= 1).all() and ((weights == 1) == (old >= sampling)).all()


def test_gap_by_hand():
    old = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, 0.0, 0.0]])
    sampling = torch.tensor([[-1.5, -1.75, -3.0], [-3.0, -9.0, -9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # |gaps| of the four real tokens: 0.5, 0.25, 0, 2
    assert logprob_gap(old, sampling, mask) == (pytest.approx(2.75 / 4), pytest.approx(2.0))
    assert logprob_gap(sampling, old, mask) == (pytest.approx(2.75 / 4), pytest.approx(2.0))


# ----- expectations, enumerated: responses of one token out of five

POLICY = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
SAMPLER = torch.tensor([0.3, 0.1, 0.2, 0.35, 0.05], dtype=torch.float64)
ADVANTAGES = torch.tensor([[1.0, -2.0, 0.5, 3.0, -1.0]], dtype=torch.float64)


def expected_gradient(drawn_from: torch.Tensor, sampling: torch.Tensor | None, cap: float | None) -> torch.Tensor:
    """The gradient of the policy loss by the policy's logits, over all tokens that may be drawn."""
    logits = POLICY.log().requires_grad_()
    logprobs, old = logits.log_softmax(-1)[None], POLICY.log()[None]
    loss = policy_loss(logprobs, old, ADVANTAGES, cliprange=0.2)
    if sampling is not None:
        loss = loss * importance_weights(old, sampling.log()[None], cap)
    (drawn_from * loss[0]).sum().backward()
    return logits.grad


def test_weighted_draws_of_another_sampler_give_the_policys_own_gradient():
    want = expected_gradient(POLICY, None, None)
    torch.testing.assert_close(expected_gradient(SAMPLER, SAMPLER, None), want, rtol=1e-12, atol=0)
    unweighted = expected_gradient(SAMPLER, None, None)
    assert (unweighted - want).norm() > 0.5 * want.norm()


def test_a_cap_keeps_what_it_does_not_reach():
    # The ratios are 1/3, 2, 1.5, 3/7 and 5: a cap of 2.5 touches the last token alone.
    want, capped = expected_gradient(POLICY, None, None), expected_gradient(SAMPLER, SAMPLER, 2.5)
    logits = POLICY.log().requires_grad_()
    # What is missing of it: (5 - 2.5) times its share of the sampler's draws.
    (-(0.05 * 2.5) * ADVANTAGES[0, 4] * logits.log_softmax(-1)[4]).backward()
    torch.testing.assert_close(capped + logits.grad, want, rtol=1e-12, atol=1e-15)


def test_weights_of_one_sampler_are_1():
    old = torch.randn(4, 6)
    assert (importance_weights(old, old.clone(), 2.0) == 1).all()
    assert math.isclose(logprob_gap(old, old.clone(), torch.ones(4, 6, dtype=torch.bool))[0], 0.0)
