"""Statistics over the real tokens of a padded tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` where ``mask`` is True; 0-d, and 0 when nothing is.

    Args:
        values: [...] float.
        mask: [...] bool, the same shape.
    """
    # where(), not multiplication: padding may hold inf or nan, and 0 * nan is nan.
    total = torch.where(mask, values, 0.0).sum()
    return total / mask.sum().clamp(min=1)


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance (no Bessel correction) of ``values`` where ``mask`` is True; 0-d."""
    return masked_mean((values - masked_mean(values, mask)) ** 2, mask)


def whiten(values: Tensor, mask: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Shift and scale the real entries to mean 0 and variance 1; masked entries become 0.

    Args:
        values: [B, R] float.
        mask: [B, R] bool.
        epsilon: added to the variance, so that constant input gives 0 and not nan.
    """
    whitened = (values - masked_mean(values, mask)) * torch.rsqrt(masked_var(values, mask) + epsilon)
    return torch.where(mask, whitened, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float | None:
    """Share of the returns' variance that the values explain: 1 - Var(returns - values) / Var(returns).

    0 is what their mean would do. None where the returns are all alike.

    Args:
        values, returns: [B, R] float.
        mask: [B, R] bool.
    """
    spread = float(masked_var(returns, mask))
    return 1 - float(masked_var(returns - values, mask)) / spread if spread > 0 else None
