"""Models made ready for the hot path; float32 masters of weights that the models themselves hold in bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from chatrlhf.compat import foreach_copy
from chatrlhf.models.kernels.attention import patch_attention
from chatrlhf.models.kernels.equivalence import Matches, outputs_match
from chatrlhf.models.kernels.rms_norm import patch_rms_norms
from chatrlhf.models.kernels.swiglu import patch_swiglu
from chatrlhf.models.loading.lora import has_adapters
from chatrlhf.runtime.malloc import tune_malloc


class MasterWeights:
    """Makes a module's weights bfloat16 for every product, and keeps what the optimizer improves in float32.

    bfloat16 has eight bits of mantissa: a step of a learning rate that is below a 256th of a weight would be lost
    in it. So gradients are summed (`gradients.py`) and steps made in float32 (Micikevicius et al. 2018, "Mixed
    Precision Training", section 3.1), and the copy is written anew behind each step, in place: a captured graph that
    reads it stays valid. Unlike autocast nothing is converted inside a forward.
    """

    def __init__(self, *modules: nn.Module) -> None:
        # Frozen weights too, or what is saved would not have the bytes that were loaded. Those that adapters are built
        # on are not saved.
        kept = {
            id(each): each
            for module, is_base in [(module, has_adapters(module)) for module in modules]
            for each in module.parameters()
            if each.requires_grad or not is_base
        }
        self._working = list(kept.values())
        self._masters = [nn.Parameter(each.detach().float(), each.requires_grad) for each in self._working]
        self._master_of = {id(a): b for a, b in zip(self._working, self._masters, strict=True)}
        to_bfloat16(*modules)

    def __iter__(self) -> Iterator[nn.Parameter]:
        """All of them."""
        return iter(self._masters)

    def groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Optimizer groups with masters instead of the weights that have one."""
        return [group | {"params": [self._master_of.get(id(p), p) for p in group["params"]]} for group in groups]

    def working_params(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        """The weights that masters stand behind; any other parameter is its own."""
        working_of = {id(master): each for each, master in zip(self._working, self._masters, strict=True)}
        return [working_of.get(id(each), each) for each in parameters]

    @torch.no_grad()
    def sync_working_copy(self) -> None:
        """Write the masters, as an optimizer step has left them, into the working copy."""
        foreach_copy([each.data for each in self._working], [each.data for each in self._masters])

    @contextmanager
    def fp32_weights(self) -> Iterator[None]:
        """Inside, the modules hold their masters: to be saved, or loaded into, at full precision."""
        copies = [each.data for each in self._working]
        for working, master in zip(self._working, self._masters, strict=True):
            working.data = master.data
        try:
            yield
        finally:
            for working, copy in zip(self._working, copies, strict=True):
                working.data = copy
            self.sync_working_copy()


def prepare_models(
    trained: list[nn.Module],
    frozen: list[nn.Module],
    precision: str,
    device: torch.device,
    own_attention: bool = True,
    kernels: bool = True,
    matches: Matches = outputs_match,
) -> MasterWeights | None:
    """Have models, and this process, compute as fast as they can on this device; in place.

    Args:
        trained, frozen: transformers models on ``device``; frozen ones may share weights with trained ones.
        precision: ``bf16`` or ``fp32``.
        own_attention: whether this package's attention may replace PyTorch's.
        kernels: whether any of `models/kernels` may replace what transformers computes.
        matches: tries whether a replacement computes the same.

    Returns:
        The masters of the trained models' weights, which are what an optimizer has to improve; None in float32,
        where the models' own weights are.
    """
    if device.type == "cpu":
        tune_malloc()
    for model in (*trained, *frozen) if kernels else ():
        if own_attention:
            patch_attention(model, device)
        patch_rms_norms(model, device, matches)
        patch_swiglu(model, device, matches)
    if precision != "bf16":
        return None
    # First, because it takes what it keeps in float32 from the models.
    masters = MasterWeights(*trained)
    to_bfloat16(*frozen)
    return masters


def to_bfloat16(*modules: nn.Module) -> None:
    """Make weights bfloat16; quantized weights, and buffers such as rotary frequencies, stay as they are."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.bfloat16()
