"""Gated feed-forward networks that keep half as much for their backward, in the place of a model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu


@torch.no_grad()
def prefer_lean_gates(model: nn.Module, device: torch.device) -> None:
    """Replace the forward of a CPU model's SwiGLU networks by one that keeps less; the numbers stay what they are.

    A Llama keeps gate, silu(gate), up and their product, each 2.7 times as wide as the model: half of all it keeps.
    Gate and up give the other two again in two quick passes. Which modules qualify is not read off a list: each that
    looks like one is tried on a few states. Weights, their names and what is saved stay as they are.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            lean = _LeanForward(module)
            if lean.agrees():
                module.forward = lean


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, "GLU Variants Improve Transformer", eq. 6), all of one shape."""
    return _SwiGLU.apply(gate, up)


class _LeanForward:
    """down_proj(swiglu(gate_proj(x), up_proj(x))); the three are called as they are, adapters and all."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.usual = module, module.forward

    def __call__(self, states: Tensor) -> Tensor:
        gate, up = self.module.gate_proj(states), self.module.up_proj(states)
        mixed = swiglu(gate, up)
        if not mixed.requires_grad:
            return self.module.down_proj(mixed)
        place, gate, up = mixed.data_ptr(), gate.detach(), up.detach()

        def pack(saved: Tensor) -> Tensor | torch.Size:
            whole = saved.data_ptr() == place and saved.numel() == gate.numel() and saved.is_contiguous()
            return saved.shape if whole else saved

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            return kept if isinstance(kept, Tensor) else swiglu(gate, up).view(kept)

        with saved_tensors_hooks(pack, unpack):
            return self.module.down_proj(mixed)

    def agrees(self) -> bool:
        """Whether it is the module's forward; not where the activation is another one, for instance."""
        width = getattr(self.module.up_proj, "in_features", None)
        if width is None:
            return False
        weight = self.module.up_proj.weight
        states = torch.linspace(-2, 3, 3 * width, device=weight.device).view(3, width).to(weight.dtype)
        want = self.usual(states)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        return bool((self(states) - want).abs().max() <= tolerance * want.abs().max())


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * up, gate), silu(gate).mul_(gradient)
