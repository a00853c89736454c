"""What ranks know of each other and do together; the one place that talks to `torch.distributed`.

A launch of several processes (torchrun, accelerate, deepspeed) is data parallelism: every rank works on its own rows.
Where a stage asks for nothing else, each holds all weights and gradients are added up once an optimizer step; how
DeepSpeed or FSDP2 shard them is `sharding`. In one process each function here is the identity.

What is agreed on goes through the CPU (gloo), gradients through the device they are on (nccl on GPUs).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from chatrlhf.compat import default_store
from chatrlhf.errors import UserError
from chatrlhf.errors.boundary import doing

T = TypeVar("T")

# A rank that waits longer than this for the others gives up; rank 0 writes checkpoints meanwhile.
TIMEOUT = timedelta(minutes=30)


def start() -> None:
    """Join the group of this launch, where it has several processes; once is enough.

    Raises:
        UserError: there are more processes on this machine than GPUs.
    """
    with doing("reading WORLD_SIZE and LOCAL_RANK, which a launcher sets", untrusted=True):
        processes, local = (
            int(os.environ.get(name, usual)) for name, usual in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    if processes == 1 or dist.is_initialized():
        return
    from accelerate import PartialState

    backend = "gloo"
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"process {local} of this machine has no GPU of its own, there are {gpus}; launch at most {gpus} "
                "processes here (--nproc_per_node)"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    else:
        # accelerate would number the CPUs, and transformers finds no checkpoint's tensors on a "cpu:0".
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    with doing("joining the other processes (WORLD_SIZE, RANK, MASTER_ADDR, MASTER_PORT)", untrusted=True):
        dist.init_process_group(backend, timeout=TIMEOUT)
        PartialState(cpu=not torch.cuda.is_available())  # so that TRL's trainers and the trackers see this group


def init_single_process_group() -> None:
    """Make a group of this process alone, where there is none: DeepSpeed wants one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def end() -> None:
    """Leave the group, after everything was done."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the one that prints and writes."""
    return rank() == 0


def claims_failure_report() -> bool:
    """Whether this process is to say why the run ends: the first that fails is. Later ones fail because of it."""
    if world_size() == 1:
        return True
    try:
        return default_store().add("chatrlhf/failures", 1) == 1
    except RuntimeError:  # whoever kept the count is gone
        return True


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1))


def gather_objects(value: T) -> list[T]:
    """``value`` of every rank, in the order of ranks; small and on the CPU, it is pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_results(work: Callable[[], T]) -> list[T]:
    """What ``work`` gives on every rank, in the order of ranks.

    Raises:
        UserError: on all ranks alike, where it was raised on one: no one is left waiting.
    """
    if world_size() == 1:
        return [work()]
    result, failure = None, None
    try:
        result = work()
    except UserError as error:
        failure = error
    shares = gather_objects((result, failure))
    for _, error in shares:
        if error is not None:
            raise error
    return [each for each, _ in shares]


def all_reduce_max(number: int) -> int:
    """The largest of the ranks' numbers."""
    if world_size() == 1:
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def sum_over_ranks(numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """0-d tensors added up over ranks, by name; every rank has the same names in the same order."""
    if world_size() == 1 or not numbers:
        return numbers
    total = torch.stack([each.float() for each in numbers.values()])
    dist.all_reduce(total)
    return dict(zip(numbers, total.unbind(), strict=True))


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Add up tensors over ranks, in their own precision."""
    if world_size() > 1:
        for each in tensors:
            dist.all_reduce(each)


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's values, in place."""
    if world_size() > 1:
        for each in tensors:
            dist.broadcast(each.data, src=0)
