"""What trains a part of an actor-critic whose states are sharded: one interface over DeepSpeed and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from chatrlhf.compat import block_names, set_block_names

Outputs = dict[str, Tensor]


class Engine(Protocol):
    """Owns weights, gradients and the optimizer of what it was given. All ranks do the same with it, in one order."""

    model: nn.Module  # the library's own
    optimizer: torch.optim.Optimizer  # whose learning rates may be set

    def __call__(self, work: Callable[[], Outputs]) -> Outputs:
        """A forward: what ``work`` gives, which may call the modules that the engine was given."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add up the gradient of ``loss``, over ranks too: a sum, no mean; ``last`` before a step or not."""

    def clip(self) -> float | None:
        """Clip; returns the gradient's norm before, None where only the step clips."""

    def step(self) -> float | None:
        """Step and forget the gradient; returns its norm before clipping where `clip` does not."""

    def skip(self) -> None:
        """Forget the gradient, after a `clip` that gave its norm."""

    def save(self, folder: Path) -> None:
        """Write weights and optimizer as they are sharded."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote, with as many ranks."""

    def close(self) -> None:
        """Free what is held besides the weights."""


class Root(nn.Module):
    """The modules of a part below one: engines watch for the beginning of a forward there."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        # By these engines know blocks, and the sizes that they work out from a width.
        self.config = next((each.config for each in self.modules() if hasattr(each, "config")), None)
        named = {name for each in self.modules() for name in block_names(each)}
        set_block_names(self, sorted(named & {type(each).__name__ for each in self.modules()}))
        self.eval()

    def forward(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives."""
        return work()
