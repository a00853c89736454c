"""Several models on one set of weights in memory.

Where a policy is trained by adapters, its reference, its critic and its reward model may be built on the same base.
Each has modules of its own, and the weights in them that no one trains are the very same: no model has to be told
which of several adapters to use, and two of them can run side by side.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatrlhf.compat import forget_adapters
from chatrlhf.config.model import PeftConfig
from chatrlhf.models.loading.adapter_loading import attach
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.loading.lora import (
    TRAINED,
    adapted_weights,
    add_adapters,
    base_of,
    has_adapters,
    is_adapter,
    where,
)
from chatrlhf.models.loading.quantization import how_quantized, in_whole_weights, states_beside_weights
from chatrlhf.models.loading.rope import same_positions


@dataclass
class Base:
    """Weights that a policy's adapters are built on, and that others may be built on, too."""

    policy: nn.Module  # with its adapters
    place: str  # folder or hub id

    def matches(self, folder: Path, settings: Any, quantization: dict[str, Any] | None) -> bool:
        """Whether the adapters in a folder were trained on the same weights, at the same positions, as held here.

        Args:
            settings: the configuration that their base had.
            quantization: how it was held; None: whole.
        """
        base, own = base_of(str(folder)), self.policy.config
        return (
            base is not None
            and where(base) == where(self.place)
            and settings.model_type == own.model_type
            and same_positions(settings, own)
            and quantization == how_quantized(self.policy)
        )

    def backbone(self, folder: Path) -> nn.Module:
        """The backbone that the adapters in a folder make of these weights."""
        backbone = copy_without_adapters(backbone_of(self.policy))
        attach(backbone, folder)
        return backbone


def share_weights(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have any weight in memory in common."""
    return not {id(each) for each in first.parameters()}.isdisjoint({id(each) for each in second.parameters()})


def copy_sharing_frozen(model: nn.Module) -> nn.Module:
    """A copy on the very weights that are not trained, since they will stay equal; what adapters add is copied."""
    shared: dict[int, Any] = {
        id(each): each for name, each in model.named_parameters() if not each.requires_grad and not is_adapter(name)
    }
    for state in states_beside_weights(model):
        shared[id(state)] = state
    return copy.deepcopy(model, shared)


def copy_without_adapters(model: nn.Module) -> nn.Module:
    """The same without the adapters."""
    copied = copy_sharing_frozen(model)
    for name, layer in adapted_weights(copied).items():
        copied.set_submodule(name.rpartition(".")[0], layer.get_base_layer())
    forget_adapters(copied)
    return copied


@torch.no_grad()
def merged_copy(model: nn.Module) -> nn.Module:
    """A copy in weights of its own, all trained: with what adapters add to them, and in float32 if quantized."""
    added = {name: layer.get_delta_weight(TRAINED) for name, layer in adapted_weights(model).items()}
    bare = copy_without_adapters(model)
    read_back = in_whole_weights(bare, added)
    copied = copy.deepcopy(bare)
    for name in added.keys() - read_back:
        weight = copied.get_parameter(name)
        weight += added[name].to(weight.dtype)
    return copied.requires_grad_(True)


def with_lora(backbone: nn.Module, settings: PeftConfig, base: str) -> nn.Module:
    """A copy of a backbone of which adapters alone are trained: its own go on, or it is given some.

    Args:
        base: where the backbone's weights are, for those that are given.
    """
    copied = copy_sharing_frozen(backbone)
    if has_adapters(copied):
        for name, weight in copied.named_parameters():
            weight.requires_grad_(is_adapter(name))
    else:
        add_adapters(copied, settings, base)
    return copied
