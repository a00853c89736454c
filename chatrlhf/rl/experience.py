"""From a scored rollout to what the update learns from; one dictionary entry an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from chatrlhf.functional.advantages import gae, group_normalised, leave_one_out
from chatrlhf.functional.kl import k1
from chatrlhf.functional.losses import Aggregation
from chatrlhf.functional.masked import whiten
from chatrlhf.functional.rewards import token_rewards
from chatrlhf.types import Experience, ScoredRollout


@dataclass(frozen=True)
class Estimation:
    """What the estimators may be told besides the rollout."""

    kl_coef: float
    gamma: float = 1.0
    lam: float = 0.95
    whiten_advantages: bool = True


# A scored rollout to advantages [B, R] and, where a critic learns, returns [B, R].
Estimator = Callable[[ScoredRollout, Estimation], tuple[Tensor, Tensor | None]]


def gae_advantages(scored: ScoredRollout, how: Estimation) -> tuple[Tensor, Tensor]:
    """GAE over per-token rewards that carry the KL term."""
    mask = scored.rollout.response_mask
    rewards = token_rewards(scored.scores, scored.old_logprobs, scored.ref_logprobs, mask, how.kl_coef)
    assert scored.values is not None
    advantages, returns = gae(rewards, scored.values, mask, how.gamma, how.lam)
    return whiten(advantages, mask) if how.whiten_advantages else advantages, returns


def leave_one_out_advantages(scored: ScoredRollout, how: Estimation) -> tuple[Tensor, None]:
    """The sequence's score less beta times its KL, against the other samples of its prompt."""
    mask = scored.rollout.response_mask
    kl = (k1(scored.old_logprobs, scored.ref_logprobs) * mask).sum(dim=1)
    advantages = leave_one_out(scored.scores - how.kl_coef * kl, scored.rollout.prompts.group_ids)
    return advantages[:, None] * mask, None


def group_advantages(scored: ScoredRollout, how: Estimation) -> tuple[Tensor, None]:
    """Scores normalized within their group; the KL term stands in the loss."""
    advantages = group_normalised(scored.scores, scored.rollout.prompts.group_ids)
    return advantages[:, None] * scored.rollout.response_mask, None


@dataclass(frozen=True)
class Algorithm:
    """How advantages are estimated, how tokens are weighed, and where the KL term sits."""

    estimate: Estimator
    aggregation: Aggregation
    kl_in: Literal["reward", "loss"]
    needs_critic: bool


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(gae_advantages, "token_mean", kl_in="reward", needs_critic=True),
    "rloo": Algorithm(leave_one_out_advantages, "sequence_sum", kl_in="reward", needs_critic=False),
    "grpo": Algorithm(group_advantages, "sequence_mean", kl_in="loss", needs_critic=False),
}


@torch.no_grad()
def make_experience(scored: ScoredRollout, algorithm: Algorithm, how: Estimation) -> Experience:
    """Estimate advantages and returns, once a rollout, and bring everything into one record."""
    rollout = scored.rollout
    advantages, returns = algorithm.estimate(scored, how)
    return Experience(
        prompt_ids=rollout.prompts.input_ids,
        prompt_mask=rollout.prompts.attention_mask,
        response_ids=rollout.response_ids,
        response_mask=rollout.response_mask,
        min_new_tokens=rollout.min_new_tokens,
        old_logprobs=scored.old_logprobs,
        ref_logprobs=scored.ref_logprobs,
        sampling_logprobs=rollout.sampling_logprobs,
        advantages=advantages,
        returns=returns,
        old_values=scored.values,
        trunk_states=scored.trunk_states,
        trunk_rows=scored.trunk_rows,
    )
