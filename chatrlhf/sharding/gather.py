"""Models put together again from what several processes hold of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from chatrlhf.compat import has_fp32_master, own_parameters

WRAPPER = "_checkpoint_wrapped_module."  # in names, where a wrapper computes activations again


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of a model that has all but its weights, made before they are sharded: what is done to it then, hooks
    and all, the copy knows nothing of."""
    bare = {id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in model.parameters()}
    return copy.deepcopy(model, bare)


def unshard(bare: nn.Module, model: nn.Module, keep: bool) -> nn.Module:
    """The outline of a model with the weights of the model itself, whole and plain, in the CPU's memory.

    Args:
        keep: all ranks call this; one that does not keep them is left with the outline.
    """
    weights = {name: weight.cpu() for name, weight in full_params(model) if keep}
    if not keep:
        return bare
    made: dict[int, nn.Parameter] = {}
    for prefix, module in bare.named_modules():
        for name, empty in list(own_parameters(module).items()):
            if empty is None:
                continue
            if id(empty) not in made:  # tied weights are one
                value = weights[f"{prefix}.{name}" if prefix else name]
                made[id(empty)] = nn.Parameter(value, empty.requires_grad)
            own_parameters(module)[name] = made[id(empty)]
    return bare.train(model.training)


@torch.no_grad()
def full_params(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by each of its names, whole: in float32 where it is trained, else as it is.

    All ranks take all of them, in this order.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name.replace(WRAPPER, ""), whole_weight(parameter)


@torch.no_grad()
def trained_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What is trained, by name, whole: in float32 what an optimizer improves, else what a forward computes with.

    All ranks take all of it, in this order.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight = whole_weight(parameter) if dtype == torch.float32 else _gathered(parameter)
            yield name.replace(WRAPPER, ""), weight.to(dtype)


@torch.no_grad()
def whole_weight(parameter: nn.Parameter) -> Tensor:
    """A parameter as all ranks together hold it; the one that the optimizer improves, where there is a working copy."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor) or not parameter.requires_grad:
        return _gathered(parameter)
    if has_fp32_master(parameter):
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return parameter.detach().float()


def _gathered(parameter: nn.Parameter) -> Tensor:
    """A parameter as a forward finds it."""
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):  # FSDP2
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):  # ZeRO-3
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().clone()
    return parameter.detach()
