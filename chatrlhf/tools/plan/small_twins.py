"""Whether a kernel computes what a module without content would: asked of a small module of its kind, with content."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from chatrlhf.models.kernels.equivalence import Forward, outputs_match
from chatrlhf.tools.plan.quantized_linear import QuantizedLinear

WIDTH, INNER = 8, 16  # of a network's states, and inside it


def small_twins_match(usual: Forward, other: Forward, width: int, like: Tensor) -> bool:
    """As `outputs_match`, of modules whose weights are fake tensors.

    Args:
        usual: a module's own forward.
        other: the kernel, which has that module as its ``module``.
        width, like: of the module itself; its twin is narrow and in float32.
    """
    kernel = copy.copy(other)
    kernel.module = _small_twin(other.module, width)
    return outputs_match(kernel.module.forward, kernel, WIDTH, torch.empty(0))


@torch.no_grad()
def _small_twin(module: nn.Module, width: int) -> nn.Module:
    """The module's copy with narrow weights, drawn once, in float32."""
    generator = torch.Generator().manual_seed(0)
    inner = getattr(getattr(module, "up_proj", None), "out_features", width)
    narrow = {width: WIDTH, inner: WIDTH if inner == width else INNER}
    memo: dict[int, object] = {}  # what a copy has instead of something, by its id
    for each in module.modules():
        if isinstance(each, QuantizedLinear):
            memo[id(each)] = nn.Linear(
                narrow[each.in_features], narrow[each.out_features], each.bias is not None, device="cpu"
            )
        if hasattr(each, "config"):
            memo[id(each.config)] = each.config
    for each in module.parameters():
        shape = [narrow.get(size, size) for size in each.shape]
        memo[id(each)] = nn.Parameter(torch.rand(shape, generator=generator) - 0.25, requires_grad=False)
    twin = copy.deepcopy(module, memo)
    if hasattr(twin, "normalized_shape"):
        twin.normalized_shape = (WIDTH,)
    return twin
