"""Linear layers with quantized weights, as bitsandbytes has them; it cannot pack what has no content."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chatrlhf.compat import modules_kept_in_fp32
from chatrlhf.config.model import QuantizationKeys

BLOCK, BLOCK_OF_SCALES = 64, 256  # weights with a scale of their own, and scales with one (Dettmers et al. 2023)


def quantize_linears(model: nn.Module, keys: QuantizationKeys, computes: torch.dtype) -> None:
    """Replace a model's linear layers, but for its output head and those that transformers keeps in float32 (T5's).

    It is done in place, and nothing of the model is trained then.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    whole = modules_kept_in_fp32(model)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and child not in whole:
            setattr(model.get_submodule(parent), child, QuantizedLinear(module, stored_bytes(module, keys), computes))
    model.requires_grad_(False)


def stored_bytes(module: nn.Module, keys: QuantizationKeys) -> int:
    """Bytes of a layer's weights and of their scales."""
    inner, outer = _sizes(module)
    if keys.load_in_8bit:
        return inner * outer + 4 * outer
    scales = -(-inner * outer // BLOCK)
    of_scales = scales + 4 * -(-scales // BLOCK_OF_SCALES) if keys.bnb_4bit_use_double_quant else 4 * scales
    return -(-inner * outer // 2) + of_scales


class QuantizedLinear(nn.Linear):
    """Its weight is a row of bytes; each product, forwards and backwards, has it whole for as long as it takes."""

    def __init__(self, whole: nn.Module, size: int, computes: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = _sizes(whole)
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        self.bias, self.computes = whole.bias, computes

    def forward(self, states: Tensor) -> Tensor:
        size = (self.out_features, self.in_features)
        product = _Product.apply(states.to(self.computes), size)
        return (product if self.bias is None else product + self.bias.to(product.dtype)).to(states.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, size: tuple[int, int]) -> Tensor:
        ctx.size = size
        return nn.functional.linear(states, states.new_empty(size))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ gradient.new_empty(ctx.size), None


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    if isinstance(module, Conv1D):
        return tuple(module.weight.shape)
    return module.in_features, module.out_features
