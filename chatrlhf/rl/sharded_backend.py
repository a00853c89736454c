"""Gradient backend of models whose gradients, optimizer states or weights are sharded over ranks.

DeepSpeed and FSDP2 communicate inside a forward or a backward, so here all ranks make the same number of them, in one
order.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.models.actor_critic import ActorCritic, DetachPoint, Evaluation, Part
from chatrlhf.models.loading.model_info import fingerprint
from chatrlhf.models.sequences import Sequences, head_is_plain
from chatrlhf.rl.gradient_backend import GradientBackend
from chatrlhf.runtime.collectives import all_reduce_max, is_main
from chatrlhf.runtime.cpu_parallel import sequential
from chatrlhf.runtime.optimizer import Hyperparameters
from chatrlhf.sharding.engine import Engine
from chatrlhf.sharding.gather import trained_weights
from chatrlhf.sharding.safe_loading import known_objects

# Weights of a part's modules and their optimizer groups to the engine that trains them.
MakeEngine = Callable[[list[nn.Module], list[dict[str, Any]]], Engine]


@dataclass
class ShardedModels:
    """An actor-critic that is trained by engines, and its models for everything else."""

    trained: ActorCritic  # what the engines hold
    whole: ActorCritic  # what samples and scores: the same object, but where weights are sharded, too
    parts: list[Part]
    engines: list[Engine]
    fingerprint: str
    dtype: torch.dtype  # of rollouts
    as_loaded: dict[str, Tensor]  # frozen weights that will be saved again, in their own bytes

    @property
    def params_are_sharded(self) -> bool:
        """Whether no process has all weights of what is trained, but for the time of a rollout."""
        return self.whole is not self.trained

    @contextmanager
    def gathered_params(self, device: torch.device) -> Iterator[None]:
        """Inside, `whole` has the weights that the engines have now, on a device, as a forward computes with them."""
        if not self.params_are_sharded:
            yield
            return
        with _holding(self.whole, trained_weights(self.trained, self.dtype), device):
            yield

    @contextmanager
    def in_full_precision(self) -> Iterator[None]:
        """Inside, `whole` has what is to be saved, in the CPU's memory, and in that of rank 0 alone, which saves it."""
        weights = trained_weights(self.trained, torch.float32)
        if not is_main():
            deque(weights, maxlen=0)  # taken part in, and not kept
            yield
            return
        with _holding(self.whole, chain(weights, self.as_loaded.items()), torch.device("cpu")):
            yield


@contextmanager
def _holding(model: nn.Module, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Iterator[None]:
    """Inside, a model has these weights."""
    own = dict(model.named_parameters())
    before = {}
    for name, value in weights:
        before[name] = own[name].data
        own[name].data = value.to(device)
    try:
        yield
    finally:
        for name, data in before.items():
            own[name].data = data


def shard_actor_critic(
    actor_critic: ActorCritic,
    frozen: list[nn.Module],
    prepare: Callable[[ActorCritic], None],
    make_engine: MakeEngine,
    groups: list[dict[str, Any]],
    with_weights: bool,
    dtype: torch.dtype,
    device: torch.device,
    keep_frozen: bool,
) -> ShardedModels:
    """Hand an actor-critic over to engines, one for each of its parts.

    Args:
        actor_critic: on ``device``, or in the CPU's memory.
        frozen: other models, which may share frozen weights with it; they are moved to ``device``.
        prepare: what is done to the models that are trained, and to no others, before engines have them.
        groups: as from `parameter_groups`.
        with_weights: weights are sharded, too. The engines then get a copy, and the actor-critic itself is left without
            what is trained, until it is `gathered_params`; what is frozen stays there.
        dtype: of all products.
        keep_frozen: whether frozen weights are to be saved again.
    """
    known = fingerprint(actor_critic)
    head_is_plain(actor_critic.policy), actor_critic.supports_packing  # answered while the models are whole
    whole = actor_critic
    trained = {id(each) for each in whole.parameters() if each.requires_grad}
    as_loaded = {name: each.data for name, each in whole.named_parameters() if keep_frozen and id(each) not in trained}
    for module in (whole, *frozen):
        for each in module.parameters():
            if id(each) not in trained and each.is_floating_point():  # not quantized weights
                each.data = each.data.to(device, dtype)
    if with_weights:
        memo: dict[int, Any] = {}
        actor_critic = copy.deepcopy(whole, memo)
        groups = [group | {"params": [memo[id(each)] for each in group["params"]]} for group in groups]
        for each in whole.parameters():
            if id(each) in trained:
                each.data = each.data.new_empty(0, device=device)
        for module in (whole, *frozen):
            module.to(device)  # their buffers
    prepare(actor_critic)
    parts = actor_critic.parts()
    if with_weights and _overlap(parts):  # one weight cannot be sharded twice
        parts = ActorCritic.parts(actor_critic)
    # An optimizer makes the groups that it is given its own, so they are told apart first.
    shares = [_groups_of(part, groups) for part in parts]
    engines = [make_engine(part.modules, share) for part, share in zip(parts, shares, strict=True)]
    return ShardedModels(actor_critic, whole, parts, engines, known, dtype, as_loaded)


def _overlap(parts: list[Part]) -> bool:
    """Whether parts have a weight in common: a frozen one, as under a critic on the policy's base."""
    seen = [{id(each) for module in part.modules for each in module.parameters()} for part in parts]
    return sum(map(len, seen)) > len(set().union(*seen))


def _groups_of(part: Part, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    own = {id(each) for module in part.modules for each in module.parameters()}
    return [dict(group) for group in groups if id(group["params"][0]) in own]


class EngineBackend(GradientBackend):
    """Gradients of engines: DeepSpeed or FSDP2, one for each part of the models.

    Gradients are clipped by engine: a separate critic by its own norm, a critic that shares weights with the policy
    together with it.

    Args:
        sharded: the models and their engines; ``actor_critic`` is what the engines hold.
        schedulers: one for each engine.
    """

    shards = True

    def __init__(self, sharded: ShardedModels, schedulers: list[Any], device: torch.device) -> None:
        super().__init__(sharded.trained, sharded.engines[0].optimizer, schedulers[0])
        self.sharded, self.schedulers, self.device = sharded, schedulers, device

    def zero_grad(self) -> None:
        """An engine's step frees its gradients."""

    def num_microbatches(self, pieces: int) -> int:
        return all_reduce_max(max(pieces, 1))

    def evaluate(self, sequences: Sequences, with_entropy: bool) -> Evaluation:
        found: dict[str, Any] = {"values": None, "entropy": None}
        with sequential():
            for part, engine in zip(self.sharded.parts, self.sharded.engines, strict=True):
                found |= engine(partial(part.evaluate, sequences, with_entropy))
        return Evaluation(**found)

    def backward(self, losses: list[Tensor], detach_point: DetachPoint | None, last: bool) -> None:
        if len(self.sharded.engines) == 1:
            losses = [sum(losses[1:], losses[0])]
        for engine, loss in zip(self.sharded.engines, losses, strict=True):
            engine.backward(loss, last)

    def reduce(self) -> None:
        """Engines reduce in their backwards."""

    def clip(self, max_grad_norm: float | None) -> list[Tensor]:
        """Engines clip by the norm that they were made with, which is the same key's."""
        return self._tensors([engine.clip() for engine in self.sharded.engines])

    def step(self) -> list[Tensor]:
        norms = [engine.step() for engine in self.sharded.engines]
        for scheduler in self.schedulers:
            scheduler.step()
        return self._tensors(norms)

    def skip(self) -> None:
        for engine in self.sharded.engines:
            engine.skip()

    def _tensors(self, norms: list[float | None]) -> list[Tensor]:
        return [torch.tensor(norm, device=self.device) for norm in norms if norm is not None]

    def gathered_weights(self) -> AbstractContextManager[None]:
        return self.sharded.gathered_params(self.device)

    def full_precision(self) -> AbstractContextManager[None]:
        return self.sharded.in_full_precision()

    @property
    def fingerprint(self) -> str:
        return self.sharded.fingerprint

    def save_weights(self, folder: Path) -> None:
        """They are in the shards."""

    def load_weights(self, folder: Path) -> None:
        for engine, scheduler, path in zip(self.sharded.engines, self.schedulers, self._paths(folder), strict=True):
            own = Hyperparameters(engine.optimizer, scheduler)  # engines restore the optimizer's with the weights
            with known_objects(path):
                engine.load(path)
            own.put_back()

    def save_shards(self, folder: Path) -> None:
        for engine, path in zip(self.sharded.engines, self._paths(folder), strict=True):
            engine.save(path)

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": [each.state_dict() for each in self.schedulers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for engine, scheduler, its in zip(self.sharded.engines, self.schedulers, state["schedulers"], strict=True):
            own = Hyperparameters(engine.optimizer, scheduler)
            scheduler.load_state_dict(its)
            own.put_back()

    def close(self) -> None:
        for engine in self.sharded.engines:
            engine.close()

    def _paths(self, folder: Path) -> list[Path]:
        return [folder / f"part-{number}" for number in range(len(self.sharded.engines))]
