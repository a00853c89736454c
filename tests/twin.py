"""The maths a second time: float64, plain loops over rows and tokens, nothing taken from the package.

Each function follows its equation as it is printed in the paper, not as the package computes it: the
advantage is a sum over the future and not a recursion, and so on. Arguments are nested lists, `B` rows of `R`
tokens, with a mask of the same shape; what is masked is never read.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Rows = list[list[float]]
Mask = list[list[bool]]


def real(mask: Mask) -> list[tuple[int, int]]:
    """(row, token) of each real entry."""
    return [(i, t) for i, row in enumerate(mask) for t, is_real in enumerate(row) if is_real]


def zeros(mask: Mask) -> Rows:
    return [[0.0] * len(row) for row in mask]


def mean(values: Rows, mask: Mask) -> float:
    places = real(mask)
    return sum(values[i][t] for i, t in places) / len(places)


def variance(values: Rows, mask: Mask) -> float:
    center = mean(values, mask)
    places = real(mask)
    return sum((values[i][t] - center) ** 2 for i, t in places) / len(places)


def whiten(values: Rows, mask: Mask) -> Rows:
    center, deviation = mean(values, mask), math.sqrt(variance(values, mask))
    result = zeros(mask)
    for i, t in real(mask):
        result[i][t] = (values[i][t] - center) / deviation
    return result


def token_rewards(scores: list[float], logprobs: Rows, ref_logprobs: Rows, mask: Mask, beta: float) -> Rows:
    """-beta (log pi - log pi_ref) a token, and the score where the row ends."""
    result = zeros(mask)
    for i, t in real(mask):
        result[i][t] = -beta * (logprobs[i][t] - ref_logprobs[i][t])
        if t == sum(mask[i]) - 1:
            result[i][t] += scores[i]
    return result


def gae(rewards: Rows, values: Rows, mask: Mask, gamma: float, lam: float) -> tuple[Rows, Rows]:
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, each advantage summed from scratch; return = A + V."""
    advantages, returns = zeros(mask), zeros(mask)
    for i, t in real(mask):
        length = sum(mask[i])
        for k in range(t, length):
            behind = values[i][k + 1] if k + 1 < length else 0.0
            delta = rewards[i][k] + gamma * behind - values[i][k]
            advantages[i][t] += (gamma * lam) ** (k - t) * delta
        returns[i][t] = advantages[i][t] + values[i][t]
    return advantages, returns


def discounted_returns(rewards: Rows, mask: Mask, gamma: float) -> Rows:
    """G_t = sum over k >= t of gamma^(k-t) r_k."""
    result = zeros(mask)
    for i, t in real(mask):
        result[i][t] = sum(gamma ** (k - t) * rewards[i][k] for k in range(t, sum(mask[i])))
    return result


def leave_one_out(scores: list[float], groups: list[int]) -> list[float]:
    result = []
    for i, score in enumerate(scores):
        others = [s for j, s in enumerate(scores) if groups[j] == groups[i] and j != i]
        result.append(score - sum(others) / len(others))
    return result


def group_normalised(scores: list[float], groups: list[int], epsilon: float) -> list[float]:
    result = []
    for score, group in zip(scores, groups, strict=True):
        members = [s for s, g in zip(scores, groups, strict=True) if g == group]
        center = sum(members) / len(members)
        deviation = math.sqrt(sum((s - center) ** 2 for s in members) / (len(members) - 1))
        result.append((score - center) / (deviation + epsilon))
    return result


def log_softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    total = math.log(sum(math.exp(x - top) for x in logits)) + top
    return [x - total for x in logits]


def entropy(logits: list[float]) -> float:
    """-sum p log p; a token of probability 0 contributes 0."""
    return -sum(math.exp(x) * x for x in log_softmax(logits) if x > -math.inf)


def kl(p: list[float], q: list[float]) -> float:
    """KL(p || q) by enumeration, from probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


# ----- the whole loss, with autograd: one row, then one token at a time, on a float64 model


def row_terms(
    model,
    value_of,
    prompt: list[int],
    response: list[int],
    temperature: float = 1.0,
    forbidden: tuple[int, ...] = (),
) -> list[tuple[Tensor, Tensor | None, Tensor]]:
    """(log-probability, value, entropy) of each response token, 0-d tensors with gradient.

    The model is run anew, without padding and without a cache, on every prefix of the row.

    Args:
        value_of: from the ids of a prefix, [1, T], to the value behind it, 0-d; None without a critic.
    """
    terms = []
    for t, token in enumerate(response):
        prefix = torch.tensor([prompt + response[:t]])
        logits = model(input_ids=prefix).logits[0, -1] / temperature
        allowed = [v for v in range(len(logits)) if v not in forbidden]
        probabilities = {v: p for v, p in zip(allowed, torch.softmax(logits[allowed], dim=0), strict=True)}
        total = sum(-p * torch.log(p) for p in probabilities.values())
        terms.append((torch.log(probabilities[token]), value_of(prefix) if value_of else None, total))
    return terms


def ppo_token(logprob: Tensor, old: float, advantage: float, eps: float) -> Tensor:
    """-min(r A, clip(r) A), the cases written out."""
    ratio = torch.exp(logprob - old)
    if advantage > 0 and ratio > 1 + eps:
        return torch.tensor(-(1 + eps) * advantage, dtype=torch.float64)
    if advantage < 0 and ratio < 1 - eps:
        return torch.tensor(-(1 - eps) * advantage, dtype=torch.float64)
    return -ratio * advantage


def value_token(value: Tensor, old: float, target: float, eps: float) -> Tensor:
    """Half the larger of the two squared errors."""
    moved = value
    if value > old + eps:
        moved = torch.tensor(old + eps, dtype=torch.float64)
    if value < old - eps:
        moved = torch.tensor(old - eps, dtype=torch.float64)
    plain, clipped = (value - target) ** 2, (moved - target) ** 2
    return (plain if plain >= clipped else clipped) / 2


def weight(mask: Mask, row: int, aggregation: str) -> float:
    """How much each real token of a row counts."""
    if aggregation == "token_mean":
        return 1 / sum(sum(r) for r in mask)
    if aggregation == "sequence_sum":
        return 1 / len(mask)
    return 1 / sum(mask[row]) / len(mask)
