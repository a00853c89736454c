"""How far predictions agree with judgements, with the uncertainty that goes with it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pearson(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one side does not vary."""
    n = len(first)
    mean_a, mean_b = sum(first) / n, sum(second) / n
    a, b = [x - mean_a for x in first], [y - mean_b for y in second]
    norm = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm > 0 else 0.0


def ranking_accuracy(predicted: Sequence[float], given: Sequence[float]) -> float:
    """Share of pairs with different given values that the predictions put in the same order; 0.5 without a pair."""
    right = pairs = 0.0
    for i in range(len(given)):
        for j in range(i):
            if given[i] == given[j]:
                continue
            pairs += 1
            product = (predicted[i] - predicted[j]) * (given[i] - given[j])
            right += 1.0 if product > 0 else 0.5 if product == 0 else 0.0
    return right / pairs if pairs else 0.5


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share of ``count`` trials (Wilson 1927); 95 % at z = 1.96."""
    center = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)
