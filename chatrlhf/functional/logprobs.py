"""Log-probabilities of sampled tokens, under the one distribution that sampling and scoring share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingDistribution:
    """The distribution tokens are drawn from, as a function of a model's logits.

    Engine, policy scoring and reference all use the same object, which is what makes PPO's ratio 1 and the
    KL to the reference 0 on a fresh policy. Only what can be expressed here may be sampled in a rollout:
    top-k, top-p and repetition penalties cannot (the reference's support would differ) and are refused by
    the configuration.
    """

    temperature: float = 1.0
    eos_token_ids: tuple[int, ...] = ()  # forbidden while a response is shorter than its row's min_new_tokens
    forbidden_ids: tuple[int, ...] = ()  # never sampled, such as a pad token that is not EOS

    def adjust(self, logits: Tensor, position: Tensor, min_new_tokens: Tensor) -> Tensor:
        """Logits of the distribution that is sampled; float32.

        Args:
            logits: [N, V], a model's output at N response positions.
            position: [N] int64, t of each (0 = first response token).
            min_new_tokens: [N] int64, EOS has probability 0 where ``position`` is below it.
        """
        logits = logits.float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if self.forbidden_ids:
            logits = logits.index_fill(1, logits.new_tensor(self.forbidden_ids, dtype=torch.long), -torch.inf)
        too_early = position < min_new_tokens
        if self.eos_token_ids and bool(too_early.any()):
            is_eos = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
            is_eos[list(self.eos_token_ids)] = True
            logits = logits.masked_fill(too_early[:, None] & is_eos, -torch.inf)
        return logits


def selected_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids], without building the log-softmax.

    Args:
        logits: [N, V] float32, row i being the prediction *of* ``ids[i]``: shifting is the caller's duty.
        ids: [N] int64.

    Returns:
        [N] float32. Equal to ``logits.log_softmax(-1).gather(-1, ids[:, None])``, at one [N] of memory.
    """
    return logits.gather(-1, ids[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats; [N] for logits [N, V]. A token of probability 0 contributes 0."""
    logprobs = logits.log_softmax(dim=-1)
    # A forbidden token has logprob -inf; exp(-inf) * -inf is nan, its limit (and its gradient) 0.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(dim=-1)


def sample_by_inversion(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row as the inverse of the cumulative distribution at a given uniform number.

    Because each row brings its own number, what a row draws does not depend on which rows share its batch.

    Args:
        logits: [N, V] float32; -inf marks tokens that must not be drawn.
        uniform: [N] float in [0, 1).

    Returns:
        [N] int64.
    """
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    # Scaled by the last entry (1 up to rounding), so that rounding never leaves a gap at the top end. The
    # strict comparison in searchsorted(right=True) skips tokens of probability 0.
    threshold = uniform.to(cumulative.dtype)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)
    # uniform * total may round up to total itself: then the last token that has any probability is meant.
    last_possible = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous()).squeeze(-1)
    return torch.minimum(ids, last_possible)
