"""A computation on fake tensors: the models' own code on tensors without content, and a ledger of the bytes it holds.

What a model keeps for its backward is not put down in a formula for each family. Its forward and its backward run as
they would, operation by operation, on PyTorch's fake tensors, which have a shape and no memory; 13 billion parameters
take some seconds.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import masking_utils

from chatrlhf.compat import (
    cpu_flash_attention,
    dispatch_mode,
    fake_tensor_mode,
    grouped_products,
    is_item_call,
    own_buffers,
    own_parameters,
    storage_id,
    tensors_in,
)
from chatrlhf.errors import ConfigError, UserError
from chatrlhf.functional import logprobs
from chatrlhf.models.kernels import attention
from chatrlhf.runtime.cpu_parallel import sequential
from chatrlhf.tools.plan.glibc_heap import Heap

ACTIVATIONS, GRADIENTS, IDLE = "activations", "gradients", "holes in the heap"

COMPARED = {torch.ops.aten.lt.Scalar, torch.ops.aten.lt.Tensor}


class MemoryTracker(dispatch_mode()):
    """Bytes that are alive, by what they are; and what they were when they were most.

    A model may ask what its tensors hold: whether anything is padded, whether a batch is packed. It is answered yes to
    "all are real", "all are equal", as for rows of one length, and no where it tosses a coin to leave out a block.
    """

    def __init__(self, heap: Heap | None = None) -> None:
        """
        Args:
            heap: where what comes up lies; None on a GPU.
        """
        super().__init__()
        self.heap = heap
        self.alive: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.most = 0
        self._known: dict[int, tuple[weakref.ref[Any], int, str]] = {}
        self._places: dict[int, tuple[int, int]] = {}  # in the heap
        self.kind = ACTIVATIONS  # of what comes up
        self._coin: Tensor | None = None  # the newest comparison of two numbers

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_item_call(func) and args[0].dtype is torch.bool:
            return args[0] is not self._coin
        if func is torch.ops.aten.allclose.default:
            return True
        out = func(*args, **(kwargs or {}))
        for each in tensors_in(out):
            if isinstance(each, Tensor):
                self._enter(each, self.kind, in_heap=True)
        if func in COMPARED and args[0].dim() == 0:
            self._coin = out
        return out

    def track(self, tensors: Iterable[Tensor], kind: str) -> None:
        """These are there, as ``kind``; what is entered already stays what it is."""
        for each in tensors:
            self._enter(each, kind)

    def rename(self, tensor: Tensor, kind: str) -> None:
        """A tensor that came up in a computation is of this kind."""
        place = storage_id(tensor)
        reference, size, old = self._known[place]
        self._known[place] = (reference, size, kind)
        self.alive[old] -= size
        self.alive[kind] += size

    def add(self, size: int, kind: str) -> None:
        """Bytes that no tensor of the computation stands for."""
        self.alive[kind] += size
        self._look()

    def total(self) -> int:
        """Bytes alive now."""
        return sum(self.alive.values())

    def _enter(self, tensor: Tensor, kind: str, in_heap: bool = False) -> None:
        storage = tensor.untyped_storage()
        place = storage_id(tensor)
        if place in self._known:
            return
        size = storage.nbytes()
        self._known[place] = (weakref.ref(storage, lambda _, place=place: self._leave(place)), size, kind)
        self.alive[kind] += size
        if in_heap and self.heap is not None and (found := self.heap.take(size)) is not None:
            self._places[place] = found
        self._look()

    def _leave(self, place: int) -> None:
        _, size, kind = self._known.pop(place)
        self.alive[kind] -= size
        if place in self._places:
            self.heap.give(*self._places.pop(place))

    def _look(self) -> None:
        idle = self.heap.idle if self.heap is not None else 0
        if (now := self.total() + idle) > self.most:
            self.most, self.peak = now, self.alive | ({IDLE: idle} if idle else {})


@contextmanager
def raises_if_unplannable(what: str) -> Iterator[None]:
    """A model's own code runs inside, on tensors without content, and not every model's can.

    Raises:
        ConfigError: this one's cannot; or the plan has no name for what it has.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the model's code has made of them
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{what}: there is no plan for this model, which cannot be laid out without weights "
            f"({type(error).__name__}: {reason}); a run may do well all the same"
        ) from error


class FakeDevice:
    """Where models are drawn and computed with, as on a device of one kind.

    Args:
        device_type: ``cpu`` or ``cuda``. On a GPU attention is fused at any length, and autocast keeps norms and
            softmax in float32, as its lists say.
        has_bf16: whether a GPU has products in bfloat16.
    """

    def __init__(self, device_type: str, has_bf16: bool = True) -> None:
        self.device, self.has_bf16 = torch.device(device_type), has_bf16
        self.fake = _One()

    def tracker(self, keeps_freed: bool = False) -> MemoryTracker:
        """An empty one.

        Args:
            keeps_freed: as RL has it on a CPU.
        """
        return MemoryTracker(Heap(keeps_freed) if self.device.type == "cpu" else None)

    def materialize(self, model: nn.Module) -> nn.Module:
        """A model that was made on the meta device, in place; weights that are one stay one."""
        made: dict[int, Tensor] = {}
        with self.fake:
            for module in model.modules():
                for name, each in list(own_parameters(module).items()):
                    if each is not None:
                        if id(each) not in made:
                            new = torch.empty(each.shape, dtype=each.dtype, device="cpu")
                            made[id(each)] = nn.Parameter(new, requires_grad=each.requires_grad)
                        own_parameters(module)[name] = made[id(each)]
                for name, each in list(own_buffers(module).items()):
                    if each is not None:
                        own_buffers(module)[name] = torch.empty(each.shape, dtype=each.dtype, device="cpu")
        return model

    @contextmanager
    def tracking(self, tracker: MemoryTracker, bf16: bool = False, padded: bool = False) -> Iterator[None]:
        """Inside, what is computed is entered in the ledger.

        Args:
            bf16: in autocast.
            padded: rows are of many lengths, so that attention is given a mask.
        """
        with ExitStack() as stack:
            stack.enter_context(sequential())  # other threads would compute in earnest
            stack.enter_context(attention.use_matmul_on({"cpu"} if self.device.type == "cpu" else set()))
            if not padded:
                stack.enter_context(_masks_may_look())
            stack.enter_context(_two_pieces())
            stack.enter_context(_experts())
            logprobs.id_tensor.cache_clear()
            stack.callback(logprobs.id_tensor.cache_clear)  # a run has no use for ids without content
            stack.enter_context(self.fake)
            stack.enter_context(tracker)
            if self.device.type != "cpu":
                stack.enter_context(_modes_stay_on())
                stack.enter_context(FusedAttention())
            if bf16:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                if self.device.type != "cpu":
                    stack.enter_context(InFloat32())
            yield


class _One(fake_tensor_mode()):
    """A copy of a tensor belongs to the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _One:
        return self


@contextmanager
def _two_pieces() -> Iterator[None]:
    """Log-probabilities are computed in many pieces of one size; two of them say what all would."""
    own = logprobs._chunks
    logprobs._chunks = lambda logits, count: islice(own(logits, count), 2)
    try:
        yield
    finally:
        logprobs._chunks = own


@contextmanager
def _experts() -> Iterator[None]:
    """Which expert reads which token is not known on fake tensors; how many tokens they read is."""
    with grouped_products(lambda states, weights, offs: _Grouped.apply(states.to(weights.dtype), weights)):
        yield


class _Grouped(torch.autograd.Function):
    """States [S, d] and weights [experts, d, e], to [S, e]."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(states, weights)
        return states.new_empty(len(states), weights.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return tuple(
            torch.empty_like(each) if needed else None
            for each, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        )


@contextmanager
def _masks_may_look() -> Iterator[None]:
    """transformers makes a mask wherever it may not look whether one is needed; here the ledger answers."""
    own = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = own


@contextmanager
def _modes_stay_on() -> Iterator[None]:
    """A mode is off inside of what it was shown: of a backward it would miss what is computed again there."""
    own, method = torch.autograd.has_torch_function, Tensor.backward

    def backward(self: Tensor, gradient: Tensor | None = None, **rest: Any) -> None:
        torch.autograd.backward(self, gradient, **rest)

    torch.autograd.has_torch_function, Tensor.backward = (lambda tensors: False), backward
    try:
        yield
    finally:
        torch.autograd.has_torch_function, Tensor.backward = own, method


class InFloat32(TorchFunctionMode):
    """What autocast keeps in float32 on a GPU and not on a CPU (docs of torch.amp, "CUDA Ops that can autocast")."""

    FUNCTIONS = {
        nn.functional.layer_norm,
        nn.functional.softmax,
        nn.functional.log_softmax,
        nn.functional.cross_entropy,
        torch.softmax,
        torch.pow,
        torch.rsqrt,
        Tensor.pow,
        Tensor.softmax,
    }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.FUNCTIONS and torch.is_autocast_enabled("cpu"):
            args = tuple(_raised(each) for each in args)
        return func(*args, **(kwargs or {}))


class FusedAttention(TorchFunctionMode):
    """PyTorch's fused attention as a GPU has it: a mask of its own for each call, where there is one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _fused(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (each.to(torch.get_autocast_dtype("cpu")) for each in (query, key, value))
    if enable_gqa and key.shape[1] < query.shape[1]:
        key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    if attn_mask is not None:
        # From bool: there is a number to add for each pair then. T5 learns it; the CPU's kernel has no gradient of it.
        attn_mask = attn_mask.to(query.dtype).detach()
    # The CPU's kernel keeps what a GPU's does: queries, keys, values, the result and a number a row.
    return cpu_flash_attention(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.bfloat16 else value
