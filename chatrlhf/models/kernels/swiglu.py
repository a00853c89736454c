"""Gated feed-forward networks that keep half as much for their backward, instead of a model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu

from chatrlhf.compat import storage_id
from chatrlhf.models.kernels.equivalence import Matches, outputs_match


@torch.no_grad()
def patch_swiglu(model: nn.Module, device: torch.device, matches: Matches = outputs_match) -> None:
    """Replace the forward of a CPU model's SwiGLU networks by one that keeps less; the numbers stay what they are.

    A Llama keeps gate, silu(gate), up and their product, each 2.7 times as wide as the model: half of all it keeps.
    Gate and up give the other two again in two quick passes. Which modules qualify is not read off a list: each that
    looks like one is tried on a few states. Weights, their names and what is saved stay as they are.

    Args:
        matches: tries a module; another where its weights have no content.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            continue
        lean, width = _MemoryEfficientForward(module), getattr(module.up_proj, "in_features", None)
        # Not the same with another activation, for instance.
        if width is not None and matches(module.forward, lean, width, _states_like(module)):
            module.forward = lean


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6), all of one shape."""
    return _SwiGLU.apply(gate, up)


def _states_like(module: nn.Module) -> Tensor:
    """Something of the device and precision of a module's states, which quantized weights do not have."""
    for weight in module.parameters():
        if weight.is_floating_point():
            return weight
    return torch.empty(0, device=module.up_proj.weight.device)


class _MemoryEfficientForward:
    """down_proj(swiglu(gate_proj(x), up_proj(x))); the three are called as they are, adapters and all."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, states: Tensor) -> Tensor:
        gate, up = self.module.gate_proj(states), self.module.up_proj(states)
        mixed = swiglu(gate, up)
        if not mixed.requires_grad:
            return self.module.down_proj(mixed)
        place, gate, up = storage_id(mixed), gate.detach(), up.detach()

        def pack(saved: Tensor) -> Tensor | torch.Size:
            whole = storage_id(saved) == place and saved.numel() == gate.numel() and saved.is_contiguous()
            return saved.shape if whole else saved

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else swiglu(gate, up).view(kept)

        with saved_tensors_hooks(pack, unpack):
            return self.module.down_proj(mixed)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)
