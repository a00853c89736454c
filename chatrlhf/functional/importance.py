"""Weights for tokens that were drawn by another engine than the one that is trained."""

from __future__ import annotations

import torch
from torch import Tensor


def importance_weights(old_logprobs: Tensor, sampling_logprobs: Tensor, cap: float | None) -> Tensor:
    """w = min(pi_old / pi_sampler, cap) of each token, a constant of the loss.

    Another engine computes the same weights with other kernels, often in another precision, and so draws from
    pi_sampler where the objective expects pi_old. With the loss of each token times w the expectation over the
    sampler's draws is the one over pi_old's (Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training"). A cap bounds the variance, at the price of a bias where it is reached (Ionides 2008,
    "Truncated Importance Sampling"). As in PPO's own ratio the tokens before are taken as they came.

    Args:
        old_logprobs: [B, R] of the policy before the update, by the update's own forward; 0 where masked.
        sampling_logprobs: [B, R] as the sampler gave them; 0 where masked.
        cap: None leaves the ratios as they are.

    Returns:
        [B, R] float32 without gradient, 1 where masked.
    """
    weights = importance_ratios(old_logprobs, sampling_logprobs)
    return weights if cap is None else weights.clamp(max=cap)


def importance_ratios(old_logprobs: Tensor, sampling_logprobs: Tensor) -> Tensor:
    """pi_old / pi_sampler of each token, [B, R] float32 without gradient."""
    return torch.exp(old_logprobs.detach() - sampling_logprobs.detach())


def logprob_gap(old_logprobs: Tensor, sampling_logprobs: Tensor, response_mask: Tensor) -> tuple[float, float]:
    """How far the sampler is from the policy it samples for, in nats.

    Args:
        old_logprobs, sampling_logprobs: [B, R].
        response_mask: [B, R] bool with at least one real token.

    Returns:
        Mean and maximum of |log pi_old - log pi_sampler| over the real tokens.
    """
    gap = (old_logprobs - sampling_logprobs)[response_mask].abs()
    return float(gap.mean()), float(gap.max())
