"""Gradient backends: how an update's gradients come about, are summed over ranks, stepped with and saved.

`Updater` says what is computed; a backend says by whose optimizer and in whose memory. `PlainBackend` is PyTorch
alone; DeepSpeed and FSDP2 are behind `sharded_backend.EngineBackend`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chatrlhf.models.actor_critic import ActorCritic, DetachPoint, Evaluation
from chatrlhf.models.loading.model_info import fingerprint
from chatrlhf.models.sequences import Sequences
from chatrlhf.rl.gradients import Gradients
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.runtime.cpu_parallel import run_in_parallel
from chatrlhf.runtime.optimizer import Hyperparameters

WEIGHTS = "model.safetensors"


class GradientBackend(ABC):
    """What `Updater` asks for around the maths.

    Args:
        actor_critic: the models that are trained.
        optimizer: its parameter groups have the policy's first; its learning rate is the one that is logged.
    """

    def __init__(self, actor_critic: ActorCritic, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.actor_critic, self.optimizer, self.scheduler = actor_critic, optimizer, scheduler

    shards = False  # whether models are in parts, so that all ranks have to take part in a forward

    @abstractmethod
    def zero_grad(self) -> None:
        """Free the last minibatch's gradients."""

    @abstractmethod
    def num_microbatches(self, pieces: int) -> int:
        """How many backwards this rank makes of so many pieces: at least one."""

    @abstractmethod
    def evaluate(self, sequences: Sequences, with_entropy: bool) -> Evaluation:
        """A forward with gradients: log-probabilities, values and entropies, [B, R] each."""

    @abstractmethod
    def backward(self, losses: list[Tensor], detach_point: DetachPoint | None, last: bool) -> None:
        """The backward of a microbatch, added to those before it; ``last`` of the minibatch or not."""

    @abstractmethod
    def reduce(self) -> None:
        """Sum the gradients over ranks, once a minibatch."""

    @abstractmethod
    def clip(self, max_grad_norm: float | None) -> list[Tensor]:
        """Clip; returns the gradients' norms before, 0-d, the policy's first; none where only the step clips."""

    @abstractmethod
    def step(self) -> list[Tensor]:
        """Step by the clipped gradient; returns the norms where `clip` does not."""

    @abstractmethod
    def skip(self) -> None:
        """Leave the step out: weights, moments and schedule stay as they are. Only after a `clip` that gave norms."""

    @abstractmethod
    def gathered_weights(self) -> AbstractContextManager[None]:
        """Inside, rollouts can be sampled and scored: the models of engine and scorer have the newest weights."""

    @abstractmethod
    def full_precision(self) -> AbstractContextManager[None]:
        """Inside, the models hold float32 weights: what is saved, and what is loaded into."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Equal for backends that can exchange weights."""

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write what is trained, by one process; frozen weights are loaded anew from where the run started."""

    @abstractmethod
    def load_weights(self, folder: Path) -> None:
        """Read what `save_weights` and `save_shards` wrote."""

    @abstractmethod
    def save_shards(self, folder: Path) -> None:
        """Write what this process alone holds; all processes do."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and shards."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, with this run's learning rates, betas, weight decay and schedule."""

    @abstractmethod
    def close(self) -> None:
        """Free what is held besides the models' weights."""


class PlainBackend(GradientBackend):
    """PyTorch's autograd and optimizer; ranks sum one flat float32 buffer a step (`Gradients`).

    Args:
        masters: float32 weights behind a bfloat16 working copy; None: the models' own weights are trained.
        device: of the models.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        device: torch.device,
        masters: MasterWeights | None = None,
    ) -> None:
        super().__init__(actor_critic, optimizer, scheduler)
        self.device, self.masters = device, masters

    @cached_property
    def gradients(self) -> Gradients:
        """Of the minibatch that is being learned from."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        parameters = [each for group in groups for each in group]
        return Gradients(groups, self.masters.working_params(parameters) if self.masters is not None else parameters)

    def zero_grad(self) -> None:
        self.gradients.forget()

    def num_microbatches(self, pieces: int) -> int:
        return max(pieces, 1)

    def evaluate(self, sequences: Sequences, with_entropy: bool) -> Evaluation:
        return self.actor_critic.evaluate(sequences, with_entropy, detach_point=True)

    def backward(self, losses: list[Tensor], detach_point: DetachPoint | None, last: bool) -> None:
        if detach_point is not None:
            losses[0].backward()
            run_in_parallel(detach_point.backward, losses[1].backward, self.device)
        elif self.actor_critic.critic_is_apart:
            run_in_parallel(losses[0].backward, losses[1].backward, self.device)
        else:
            sum(losses[1:], losses[0]).backward()
        self.gradients.collect()

    def reduce(self) -> None:
        self.gradients.finish()

    def clip(self, max_grad_norm: float | None) -> list[Tensor]:
        return self.gradients.clip(max_grad_norm)

    def step(self) -> list[Tensor]:
        self.optimizer.step()
        self.scheduler.step()
        if self.masters is not None:
            self.masters.sync_working_copy()
        return []

    def skip(self) -> None:
        self.zero_grad()

    def gathered_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def full_precision(self) -> AbstractContextManager[None]:
        return self.masters.fp32_weights() if self.masters is not None else nullcontext()

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.actor_critic)

    def save_weights(self, folder: Path) -> None:
        with self.full_precision():
            save_trained(self.actor_critic, folder / WEIGHTS)

    def load_weights(self, folder: Path) -> None:
        with self.full_precision():
            load_trained(self.actor_critic, folder / WEIGHTS)

    def save_shards(self, folder: Path) -> None:
        """There are none."""

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = Hyperparameters(self.optimizer, self.scheduler)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        own.put_back()

    def close(self) -> None:
        """Nothing is held besides the models."""


def save_trained(actor_critic: nn.Module, path: Path) -> None:
    """Write what is trained. Frozen weights are made anew from where the run started, as the reference is."""
    save_file({name: weight.detach().contiguous() for name, weight in _trained(actor_critic).items()}, path)


@torch.no_grad()
def load_trained(actor_critic: nn.Module, path: Path) -> None:
    """Read what `save_trained` wrote of an actor-critic with the same fingerprint."""
    saved = load_file(path)
    for name, weight in _trained(actor_critic).items():
        weight.copy_(saved[name])


def _trained(actor_critic: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in actor_critic.named_parameters() if weight.requires_grad}
