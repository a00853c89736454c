"""Log-probabilities of sampled tokens, under the one distribution that sampling and scoring share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

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
            logits: [N, V], a model's output at N response positions; left as it is.
            position: [N] int64, t of each (0 = first response token).
            min_new_tokens: [N] int64, EOS has probability 0 where ``position`` is below it.
        """
        adjusted = logits.float()
        if self.temperature != 1.0:
            adjusted = adjusted / self.temperature
        if adjusted is logits and (self.forbidden_ids or self.eos_token_ids):
            adjusted = logits.clone()
        if self.forbidden_ids:
            adjusted.index_fill_(1, id_tensor(self.forbidden_ids, logits.device), -torch.inf)
        if self.eos_token_ids:
            # Only these columns are touched, and nothing is asked of the device: no pass over V, no waiting.
            columns = id_tensor(self.eos_token_ids, logits.device)
            too_early = (position < min_new_tokens)[:, None]
            adjusted[:, columns] = adjusted[:, columns].masked_fill(too_early, -torch.inf)
        return adjusted


@cache
def id_tensor(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Token ids as int64 on a device; made once, since a GPU waits for what is sent to it."""
    return torch.tensor(ids, dtype=torch.long, device=device)


def selected_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids], without building the log-softmax.

    Args:
        logits: [N, V] float32, row i being the prediction *of* ``ids[i]``: shifting is the caller's duty.
        ids: [N] int64.

    Returns:
        [N] float32. Equal to ``logits.log_softmax(-1).gather(-1, ids[:, None])``, at one [N] of memory.
    """
    return logits.gather(-1, ids[:, None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def token_logprobs(
    logits: Tensor,
    ids: Tensor,
    position: Tensor,
    min_new_tokens: Tensor,
    distribution: SamplingDistribution,
    with_entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What the update and the scorer ask of [N, V] logits, at the memory of a few rows.

    Equal to `selected_logprobs` and `entropy_from_logits` of ``distribution.adjust(logits, …)``, gradients
    included; but float32 copies, exponentials and their gradients exist for a chunk of rows at a time, in the
    processor's cache, and of all N only the logits are kept, in the precision they came in.

    Args:
        logits: [N, V], any floating type; rows behind the N that ``ids`` names are of no meaning.
        ids: [N] int64, the sampled tokens.
        position, min_new_tokens: [N] int64, as in `SamplingDistribution.adjust`.

    Returns:
        Log-probabilities, and entropies where asked for; [N] float32 each.
    """
    logprobs, entropy = _TokenLogprobs.apply(logits, ids, position, min_new_tokens, distribution, with_entropy)
    return logprobs, entropy if with_entropy else None


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        position: Tensor,
        min_new_tokens: Tensor,
        distribution: SamplingDistribution,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(ids), device=logits.device)
        entropy = torch.empty(len(ids) if with_entropy else 0, device=logits.device)
        for rows in _chunks(logits, len(ids)):
            adjusted = distribution.adjust(logits[rows], position[rows], min_new_tokens[rows])
            # One exponential serves both: with z from its peak, log p = z - log S and H = log S - sum(e^z z) / S.
            z = adjusted - adjusted.amax(dim=-1, keepdim=True)
            exponentials = z.exp()
            total = exponentials.sum(dim=-1)
            logprobs[rows] = z.gather(-1, ids[rows, None]).squeeze(-1) - total.log()
            if with_entropy:
                # A forbidden token's z is -inf, and 0 times that is no number.
                products = exponentials.mul_(z.clamp_(min=torch.finfo(z.dtype).min))
                entropy[rows] = total.log() - products.sum(dim=-1) / total
        ctx.save_for_backward(logits, ids, position, min_new_tokens, entropy)
        ctx.distribution, ctx.with_entropy = distribution, with_entropy
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """d log p_i / dz = onehot_i - p;  dH / dz = -p (log p + H); and dz / d logits = 1 / temperature."""
        logits, ids, position, min_new_tokens, entropy = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        gradient[len(ids) :] = 0
        for rows in _chunks(logits, len(ids)):
            adjusted = ctx.distribution.adjust(logits[rows], position[rows], min_new_tokens[rows])
            weight = of_logprobs[rows, None]
            if ctx.with_entropy:
                logprobs = adjusted.log_softmax(dim=-1)
                p = logprobs.exp()
                surprise = logprobs.masked_fill_(p == 0, 0.0) + entropy[rows, None]
                part = p.mul_(surprise.mul_(of_entropy[rows, None]).add_(weight)).neg_()
            else:
                part = torch.softmax(adjusted, dim=-1).mul_(-weight)
            part.scatter_add_(1, ids[rows, None], weight)
            gradient[rows] = part if ctx.distribution.temperature == 1.0 else part.div_(ctx.distribution.temperature)
        return gradient, None, None, None, None, None


def _chunks(logits: Tensor, count: int) -> Iterator[slice]:
    """The first ``count`` rows, in pieces whose float32 copy fits into a processor's cache, or keeps a GPU busy."""
    elements = 2**26 if logits.device.type == "cuda" else 2**18
    rows = max(1, elements // logits.shape[1])
    return (slice(start, min(start + rows, count)) for start in range(0, count, rows))


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats; [N] for logits [N, V]. A token of probability 0 contributes 0."""
    logprobs = logits.log_softmax(dim=-1)
    # A forbidden token has logprob -inf; exp(-inf) * -inf is nan, its limit (and its gradient) 0.
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(dim=-1)


def sample_by_inversion(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row as the inverse of the cumulative distribution at a given uniform number.

    Because each row brings its own number, what a row draws does not depend on which rows share its batch.
    One exponential serves the draw and its log-probability; nothing of the size [N, V] is kept.

    Args:
        logits: [N, V] float32; -inf marks tokens that must not be drawn.
        uniform: [N] float in [0, 1).

    Returns:
        The tokens, [N] int64, and their log-probabilities, [N] float32; of a row with NaN among its logits the
        log-probability is NaN.
    """
    peak = logits.amax(dim=-1, keepdim=True)
    cumulative = (logits - peak).exp_().cumsum(dim=-1)
    total = cumulative[:, -1:]
    # uniform * total may round up to total itself: then the last token that has any probability is meant. The
    # strict comparison in searchsorted(right=True) skips tokens of probability 0.
    below = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform.to(total.dtype)[:, None] * total, below)
    # NaN logits point behind the last token: the clamp lets the caller find the NaN in the log-probability.
    ids = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return ids.squeeze(-1), (logits.gather(-1, ids) - peak - total.log()).squeeze(-1)
