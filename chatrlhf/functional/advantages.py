"""Estimates of how much better an action was than expected."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman et al. 2016, "High-Dimensional Continuous Control", eq. 11-16).

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  return_t = A_t + V_t.
    The last real token is terminal, whether it is EOS or the length limit: V behind it is 0.

    Args:
        rewards: [B, R].
        values: [B, R], V before each token.
        response_mask: [B, R] bool, a prefix of ones in each row.
        gamma: discount per token.
        lam: 1 gives Monte-Carlo returns, 0 one-step TD.

    Returns:
        advantages [B, R] and returns [B, R], both 0 where masked.
    """
    # Masked rewards and values are 0, so nothing flows from the padding into the last real token.
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = torch.zeros_like(rewards[:, 0])
    next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(response_mask[:, t], delta + gamma * lam * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, torch.where(response_mask, advantages + values, 0.0)


def leave_one_out(scores: Tensor, group_ids: Tensor) -> Tensor:
    """Each score less the mean of the *other* scores of its group (Ahmadian et al. 2024, "Back to Basics", RLOO).

    Args:
        scores: [B] one a sequence.
        group_ids: [B] int64, equal for samples of one prompt; every group has at least two.

    Returns:
        [B].
    """
    total, count = _group_sums(scores, group_ids)
    return scores - (total - scores) / (count - 1)


def group_normalised(scores: Tensor, group_ids: Tensor, epsilon: float = 1e-4) -> Tensor:
    """(score - group mean) / (group deviation + epsilon) (Shao et al. 2024, "DeepSeekMath", section 4.1.2: GRPO).

    Args:
        scores: [B].
        group_ids: [B] int64; every group has at least two.
        epsilon: keeps a group of equal scores at 0.

    Returns:
        [B]. The deviation is the sample's (Bessel-corrected), as in the published implementations.
    """
    total, count = _group_sums(scores, group_ids)
    centered = scores - total / count
    squares, _ = _group_sums(centered**2, group_ids)
    return centered / (torch.sqrt(squares / (count - 1)) + epsilon)


def _group_sums(values: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size of each row's group, both [B]."""
    _, group = torch.unique(group_ids, return_inverse=True)
    size = int(group.max()) + 1
    totals = values.new_zeros(size).index_add(0, group, values)
    counts = values.new_zeros(size).index_add(0, group, torch.ones_like(values))
    return totals[group], counts[group]
