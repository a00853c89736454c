"""Estimates of KL(policy || reference) from sampled tokens (Schulman 2020, "Approximating KL Divergence").

With x ~ policy and r = p_ref(x) / p_policy(x), so log r = ref_logprobs - logprobs. All take and return
tensors of one shape, usually [B, R], in nats.
"""

from __future__ import annotations

import torch
from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-log r: unbiased, may be negative for a single token."""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2: never negative, biased (its expectation is not the KL, but close where r is near 1)."""
    return 0.5 * (logprobs - ref_logprobs) ** 2


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """(r - 1) - log r: unbiased and never negative."""
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def kl_of_replies(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> float:
    """Mean KL in nats per reply by k3 summed over tokens, for show: never negative.

    Args:
        logprobs, ref_logprobs: [B, R], of the sampled tokens.
        mask: [B, R] bool.
    """
    return float((k3(logprobs, ref_logprobs) * mask).sum(dim=1).mean())
