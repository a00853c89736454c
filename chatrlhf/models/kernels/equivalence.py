"""Whether a module's forward can be had in another way, asked of the module itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor], Tensor]
Matches = Callable[[Forward, Forward, int, Tensor], bool]


def outputs_match(usual: Forward, other: Forward, width: int, like: Tensor) -> bool:
    """Whether two functions of states [3, width] agree, up to rounding in the precision (and place) of ``like``."""
    states = torch.linspace(-2, 3, 3 * width, device=like.device).view(3, width).to(like.dtype)
    want = usual(states)
    tolerance = 1e-5 if like.dtype == torch.float32 else 2e-2
    return bool((other(states) - want).abs().max() <= tolerance * want.abs().max())
