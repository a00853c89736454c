"""From one score a sequence to one reward a token."""

from __future__ import annotations

import torch
from torch import Tensor

from chatrlhf.functional.kl import k1


def shape_scores(
    raw_scores: Tensor,
    finished: Tensor,
    cliprange_reward: float | None,
    scale: float,
    missing_eos_penalty: float | None,
) -> Tensor:
    """Clip, then scale, then penalize: the score that enters the rewards.

    Args:
        raw_scores: [B] as the reward gave them.
        finished: [B] bool, False = cut by length.
        cliprange_reward: scores are clipped to +- this first; None leaves them.
        scale: the clipped score is divided by it (a running or the reference's standard deviation; the mean
            is not subtracted, as in trlX); 1 leaves it.
        missing_eos_penalty: subtracted, in units of the scaled score, where a response did not finish.

    Returns:
        [B] float32.
    """
    scores = raw_scores.float()
    if cliprange_reward is not None:
        scores = scores.clamp(-cliprange_reward, cliprange_reward)
    scores = scores / scale
    if missing_eos_penalty is not None:
        scores = torch.where(finished, scores, scores - missing_eos_penalty)
    return scores


def token_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """r_t = -beta (log pi - log pi_ref)_t, plus the score on the last real token.

    Ziegler et al. 2019 ("Fine-Tuning Language Models from Human Preferences"), eq. 2, spread over the tokens.

    Args:
        scores: [B].
        logprobs: [B, R] of the policy that sampled.
        ref_logprobs: [B, R].
        response_mask: [B, R] bool, at least one real token a row.
        kl_coef: beta.

    Returns:
        [B, R], 0 where masked. Its sum over t plus beta * KL equals ``scores``.
    """
    rewards = torch.where(response_mask, -kl_coef * k1(logprobs, ref_logprobs), 0.0)
    last = response_mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))
