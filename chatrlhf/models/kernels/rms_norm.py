"""Root-mean-square norms in few passes over memory, instead of a model's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from chatrlhf.models.kernels.equivalence import Matches, outputs_match


@torch.no_grad()
def patch_rms_norms(model: nn.Module, device: torch.device, matches: Matches = outputs_match) -> None:
    """Replace the forward of a CPU model's norms by `rms_norm`, wherever that gives the same numbers.

    Families write theirs as some twenty passes, there and back, through float32 copies; next to products in bfloat16
    that is a tenth of an update. Which modules qualify is not read off a list: each that looks like one is tried on
    a few states. Weights, their names and what is saved stay as they are.

    Args:
        matches: tries a module; another where its weights have no content.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        fast = _recognised(module)
        # Not the same where 1 is added to the weight (Gemma), for instance.
        if fast is not None and matches(module.forward, fast, len(module.weight), module.weight):
            module.forward = fast


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * states / sqrt(mean(states^2) + eps) over the last dimension (Zhang & Sennrich 2019, eq. 4).

    The mean is taken in float32; products are rounded to the states' own precision.
    """
    return _RMSNorm.apply(states, weight, eps)


def _recognised(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    eps, weight = getattr(module, "variance_epsilon", getattr(module, "eps", None)), getattr(module, "weight", None)
    if type(module).__name__.endswith("RMSNorm") and isinstance(eps, float) and isinstance(weight, nn.Parameter):
        return _FastForward(module, eps)
    return None


class _FastForward:
    """A module's forward; no closure, since a copy of the model has to use the copied weight."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module, self.eps = module, eps

    def __call__(self, states: Tensor) -> Tensor:
        # The weight when it is called: a cast or loaded model holds another than now.
        return rms_norm(states, self.module.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, eps):
        norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(states.shape[-1]).add_(eps).rsqrt_().to(states.dtype)
        normed = states * inverse
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx, gradient):
        """With n = x / r and r = sqrt(mean(x^2) + eps):  dw = sum(g n),  dx = (g w - n mean(g w n)) / r."""
        normed, weight, inverse = ctx.saved_tensors
        size = gradient.shape[-1]
        by_normed = (gradient * normed).reshape(-1, size)
        of_weight = by_normed.sum(dim=0) if ctx.needs_input_grad[1] else None
        mean = torch.mv(by_normed, weight).div_(size).view(inverse.shape)
        of_states = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return of_states, of_weight, None
