"""Which attention kernel a model uses, where that was measured to matter."""

from __future__ import annotations

import torch
from torch import nn

# PyTorch's fused attention on a CPU is made for long sequences. With plain matrix products a PPO update of 16
# sequences of 96 tokens took 0.8 of the time, decoding 0.6 of it, in bfloat16; forwards of 250 tokens half the time
# in float32. Longer ones were not measured.
SHORT = 256


def prefer_fast_attention(model: nn.Module, device: torch.device, longest: int) -> None:
    """Have a model on a CPU compute attention by plain products, if its longest sequence (in tokens) is short.

    Only a model that would use PyTorch's fused kernel is changed: another choice was somebody's own. And none that
    caps its attention scores (Gemma 2), which the fused kernel leaves out: the stages before ran without, too.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    fused = getattr(model.config, "_attn_implementation", None) == "sdpa"
    if device.type == "cpu" and longest <= SHORT and fused and not capped:
        model.set_attn_implementation("eager")
