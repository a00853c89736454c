"""The KL estimates against the KL itself, by enumeration of a small vocabulary."""

import math

import pytest
import torch
import twin

from chatrlhf.functional.kl import k1, k2, k3

P = [0.5, 0.3, 0.15, 0.05]  # policy
Q = [0.25, 0.25, 0.4, 0.1]  # reference


def expectation(estimate) -> float:
    """E over x ~ policy of an estimate at x."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (P, Q))
    return float((p * estimate(p.log(), q.log())).sum())


def test_estimates_by_hand():
    # log pi = log 0.5, log pi_ref = log 0.25:  log r = -log 2 = -0.69315, r = 0.5
    logprob, ref = torch.tensor(math.log(0.5)), torch.tensor(math.log(0.25))
    assert k1(logprob, ref).item() == pytest.approx(0.69315, abs=1e-5)
    assert k2(logprob, ref).item() == pytest.approx(0.24023, abs=1e-5)  # 0.69315^2 / 2
    assert k3(logprob, ref).item() == pytest.approx(0.19315, abs=1e-5)  # 0.5 - 1 + 0.69315


@pytest.mark.parametrize("estimate", [k1, k3])
def test_k1_and_k3_are_unbiased(estimate):
    assert expectation(estimate) == pytest.approx(twin.kl(P, Q), rel=1e-12)


def test_k2_has_its_own_expectation():
    own = sum(p * math.log(p / q) ** 2 / 2 for p, q in zip(P, Q, strict=True))
    assert expectation(k2) == pytest.approx(own, rel=1e-12)
    assert own != pytest.approx(twin.kl(P, Q), rel=0.01)  # which is not the KL


def test_k3_is_never_negative_and_k1_is():
    logprobs, ref = torch.randn(1000), torch.randn(1000)
    assert (k3(logprobs, ref) >= 0).all()
    assert (k1(logprobs, ref) < 0).any()


@pytest.mark.parametrize("estimate", [k1, k2, k3])
def test_equal_distributions_give_exactly_0(estimate):
    logprobs = torch.randn(5)
    assert (estimate(logprobs, logprobs) == 0).all()


def test_k3_stays_exact_for_tiny_differences():
    # (r - 1) - log r = x^2 / 2 + x^3 / 6 + ... with x = log r; in float32 exp(x) - 1 alone would lose it.
    assert k3(torch.tensor(-1e-3), torch.tensor(0.0)).item() == pytest.approx(5.0017e-7, rel=1e-3)


def test_gradient_of_k3_by_hand():
    # d/dlogprob [exp(ref - logprob) - 1 - (ref - logprob)] = 1 - r: pulls the token down where pi > pi_ref
    logprob = torch.tensor([math.log(0.5), math.log(0.25)], requires_grad=True)
    k3(logprob, torch.tensor([math.log(0.25), math.log(0.5)])).sum().backward()
    torch.testing.assert_close(logprob.grad, torch.tensor([1 - 0.5, 1 - 2.0]))
