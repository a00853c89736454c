"""The terms of the PPO objective, one value a token, and how tokens are weighed in a minibatch.

Every loss is sum over tokens of weight * term, where the weights are made once for a whole minibatch
(`token_weights`). Adding up microbatches then gives the minibatch's gradient exactly, however it is cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_sum", "sequence_mean"]


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """-min(ratio A, clip(ratio, 1 - eps, 1 + eps) A), ratio = pi / pi_old (Schulman et al. 2017, "PPO", eq. 7).

    Args:
        logprobs: [B, R] of the policy being trained.
        old_logprobs: [B, R] of the policy before this update, no gradient.
        advantages: [B, R].
        cliprange: eps.

    Returns:
        [B, R], to be minimized.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def policy_clipped(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """[B, R] bool, True where the clipped term is the active one, so that the token gives no gradient."""
    ratio = torch.exp(logprobs - old_logprobs)
    return ((advantages > 0) & (ratio > 1.0 + cliprange)) | ((advantages < 0) & (ratio < 1.0 - cliprange))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None) -> Tensor:
    """max((V - G)^2, (clip(V, V_old +- eps) - G)^2) / 2.

    The clipped value loss of the original PPO code (Huang et al. 2022, "The 37 Implementation Details of
    PPO", detail 9), with the half that TRL's PPO carries.

    Args:
        values: [B, R] of the critic being trained.
        old_values: [B, R] before this update.
        returns: [B, R] G.
        cliprange_value: eps, in units of the value; None leaves the loss unclipped.

    Returns:
        [B, R].
    """
    error = (values - returns) ** 2
    if cliprange_value is not None:
        clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
        error = torch.maximum(error, (clipped - returns) ** 2)
    return 0.5 * error


def token_weights(response_mask: Tensor, aggregation: Aggregation) -> Tensor:
    """How much each token counts in the loss of a minibatch.

    Args:
        response_mask: [B, R] bool of the whole minibatch, all microbatches and ranks together.
        aggregation: ``token_mean``: every real token alike (PPO). ``sequence_sum``: tokens summed, sequences
            averaged (REINFORCE, RLOO). ``sequence_mean``: tokens averaged within a sequence, then sequences
            averaged (GRPO as published).

    Returns:
        [B, R] float32, 0 where masked.
    """
    mask = response_mask.float()
    if aggregation == "token_mean":
        return mask / mask.sum().clamp(min=1)
    if aggregation == "sequence_sum":
        return mask / mask.shape[0]
    if aggregation == "sequence_mean":
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / mask.shape[0]
    raise ValueError(f"unknown aggregation {aggregation!r}")
