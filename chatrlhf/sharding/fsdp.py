"""A part of an actor-critic trained by FSDP2 (torch's `fully_shard`), as accelerate was configured for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from chatrlhf.runtime.collectives import world_size
from chatrlhf.sharding.accelerate_env import fresh_state
from chatrlhf.sharding.engine import Outputs, Root


class FsdpEngine:
    """FSDP2 behind this package's interface; see `Engine`."""

    def __init__(
        self,
        modules: list[nn.Module],
        groups: list[dict[str, Any]],
        dtype: torch.dtype,
        betas: tuple[float, float],
        weight_decay: float,
        max_grad_norm: float | None,
    ) -> None:
        """
        Args:
            groups: the optimizer's, of weights in ``modules``, each with its learning rate.
            dtype: of all products; weights, sums of gradients and what leaves the modules are float32.
        """
        self.optimizer = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
        self.max_grad_norm = float("inf") if max_grad_norm is None else max_grad_norm
        # A plugin learns from the first model that it meets which blocks there are, so each part has its own. What is
        # cast is said here: accelerate's usual policy would round log-probabilities to `dtype`.
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        fresh_state()
        self.accelerator = Accelerator(
            mixed_precision="no", fsdp_plugin=FullyShardedDataParallelPlugin(mixed_precision_policy=policy)
        )
        self.model, _ = self.accelerator.prepare(Root(modules), self.optimizer)

    def __call__(self, work: Callable[[], Outputs]) -> Outputs:
        return self.model(work)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)
        # FSDP takes the mean over ranks.
        self.accelerator.backward(loss * world_size())

    def clip(self) -> float:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def step(self) -> None:
        self.optimizer.step()
        self.skip()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        dcp.save(self._states(), checkpoint_id=str(folder))

    def load(self, folder: Path) -> None:
        states = self._states()
        dcp.load(states, checkpoint_id=str(folder))
        set_model_state_dict(self.model, states["model"])
        set_optimizer_state_dict(self.model, self.optimizer, states["optimizer"])

    def close(self) -> None:
        self.accelerator.free_memory()

    def _states(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
        }
