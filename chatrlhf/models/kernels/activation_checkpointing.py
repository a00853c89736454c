"""Activations that are computed again in the backward instead of being kept (Chen et al. 2016, section 3).

transformers' own switch works in training mode alone, which RL never enters: dropout would make a fresh policy differ
from itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from chatrlhf.errors import ConfigError


def recompute_activations(model: nn.Module, key: str) -> None:
    """Have each block of a model keep its input alone wherever gradients are asked for; in place.

    Args:
        key: what asks for it, for messages.

    Raises:
        ConfigError: transformers has not said what the model's blocks are.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise ConfigError(
            f"{key}: transformers cannot compute the activations of a {model.config.model_type} again; set it to False"
        )
    for block in blocks:
        block.forward = _recomputing(block.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def forward_of_block(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # in a rollout, whose memory of keys and values a second time would spoil
            return forward(*args, **kwargs)
        # Nothing in it is random: dropout is off.
        return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)

    return forward_of_block
