"""Whether tensors are finite: what a run publishes or steps with always is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.compat import tensors_in
from chatrlhf.errors import DivergedError
from chatrlhf.runtime.collectives import all_reduce_max

Named = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def first_not_finite(tensors: Named) -> str | None:
    """Name of the first floating-point tensor with an infinity or a NaN in it; of sharded ones, this rank's part."""
    for name, tensor in tensors:
        own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if own.is_floating_point() and not bool(own.isfinite().all()):
            return name
    return None


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What is trained of a model."""
    return ((name, each) for name, each in model.named_parameters() if each.requires_grad)


def moments(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """An optimizer's states by number of parameter and name."""
    for number, state in enumerate(optimizer.state.values()):
        for name, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, Tensor):
                yield f"the optimizer's {name} of parameter {number}", value


def require_finite(subject: str, tensors: Named, remedy: str) -> None:
    """Refuse to publish what is not finite, on every rank where one has such a tensor.

    Args:
        subject: what would be published.
        remedy: what can be done instead.

    Raises:
        DivergedError: it names the first such tensor.
    """
    name = first_not_finite(tensors)
    if all_reduce_max(name is not None):
        where = f"{name} is not finite" if name else "another process has weights that are not finite"
        raise DivergedError(f"{subject}: {where}, so nothing is saved; {remedy}")


def first_module_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the module whose output is the first not to be finite in a forward; None where all are.

    Args:
        forward: calls the model, or parts of it.
    """
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: Any, outputs: Any) -> None:
            given = ((name, each) for each in tensors_in(outputs) if isinstance(each, Tensor))
            if not found and first_not_finite(given) is not None:
                found.append(name)

        return check

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
