"""Decoding as a GPU likes it: fixed tensors, and each shape of a step recorded once as a CUDA graph.

A step of a small batch is hundreds of kernels of a few microseconds each; to launch them one by one takes longer than
to run them. A graph is launched at once. It is bound to the addresses it was recorded with, so all that a step reads
and writes lives in tensors that stay where they are from rollout to rollout: the slots, keys, values and mask here, and
the weights, which the update changes in place.

All but the few lines of `Graphs.run` that record and replay runs on any device, and is tested on a CPU.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from chatrlhf.compat import attention_of
from chatrlhf.models.kernels.attention import NAME, cudnn_for_decoding
from chatrlhf.rollout.context import forward_arguments
from chatrlhf.rollout.decoding import Decoding, Slots
from chatrlhf.rollout.kv_cache import BatchKVCache

WIDTH = 128  # columns are shown to the model in whole numbers of these: each width needs a graph of its own
FEWEST_SLOTS = 16  # and so does each number of slots: the first, and the powers of two below it down to this
WARM_UP = 2  # steps of a shape before it is recorded: libraries choose kernels and make their workspaces


class StaticLayer(CacheLayerMixin):
    """One attention layer's keys and values at fixed places, of which a part is shown to the model."""

    is_compileable = True  # transformers then asks nothing of the device while it makes a mask for one token
    is_sliding = False

    def __init__(self, column: Tensor) -> None:
        super().__init__()
        self.column = column

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a static layer is filled by `StaticBatchKVCache.begin`")

    def hold(self, slots: int, width: int, keys: Tensor, values: Tensor) -> None:
        """Have room, all zeros, for ``slots`` times ``width`` of what keys and values are, [., heads, ., size]."""
        if not self.is_initialized:
            self.held = tuple(each.new_empty(slots, each.shape[1], width, each.shape[3]) for each in (keys, values))
            self.is_initialized = True
        for each in self.held:
            each.zero_()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one position into the column that is being filled; returns all that is shown."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> Tensor:
        return self.column  # on the device: a number would be frozen into the graph

    def get_max_length(self) -> int:
        return self.held[0].shape[2]


class StaticBatchKVCache(BatchKVCache):
    """`BatchKVCache` in tensors that stay where they are; a part of them is shown to the model."""

    block = WIDTH

    def __init__(self, model: nn.Module, layers: int, slots: int, width: int, device: torch.device) -> None:
        # A mask that is made already is taken as it is by these; what transformers does to make one is recorded with
        # the rest, if it can be (for BLOOM's, which needs one of two dimensions to know its positions, it cannot).
        made = attention_of(model.config) in ("sdpa", "eager", NAME)
        takes_positions, _ = forward_arguments(model)
        self.added = next(model.parameters()).dtype if made and takes_positions else None
        self.column = torch.zeros(1, dtype=torch.long, device=device)  # the last that is filled
        self.held_mask = torch.zeros(slots, width, dtype=torch.bool, device=device)
        self.cache = Cache(layers=[StaticLayer(self.column) for _ in range(layers)])

    def begin(self, mask: Tensor, cache: DynamicCache, of_row: Tensor) -> None:
        """Forget all and take up prompts, given as `write` takes them."""
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            if new.is_initialized:
                layer.hold(*self.held_mask.shape, new.keys, new.values)
        self.rows, self.filled = mask.shape
        self.column.fill_(self.filled - 1)
        self.write(torch.arange(self.rows, device=mask.device), mask, cache, of_row)

    def visible_columns(self, columns: int) -> int:
        """Let the model see room for ``columns`` in all; returns how many it sees."""
        width = -(-columns // WIDTH) * WIDTH
        assert width <= self.held_mask.shape[1], f"{columns} columns, room for {self.held_mask.shape[1]}"
        self.mask = self.held_mask[: self.rows, :width]
        for layer in self._layers():
            layer.keys, layer.values = (each[: self.rows, :, :width] for each in layer.held)
        return width

    def extend(self) -> Tensor:
        """Open the next column, as far as the device knows: ``filled`` is counted outside of the graph.

        Returns:
            The mask, [n, width] bool, or what is added to the scores, [n, 1, 1, width].
        """
        self.column += 1
        self.mask.index_fill_(1, self.column, True)
        if self.added is None:
            return self.mask
        bias = torch.zeros(self.mask.shape, dtype=self.added, device=self.mask.device)
        return bias.masked_fill_(~self.mask, torch.finfo(self.added).min)[:, None, None]

    def keep(self, index: Tensor) -> None:
        self.rows = len(index)
        for held in (self.held_mask, *(each for layer in self._layers() for each in layer.held)):
            held[: self.rows] = held[index]

    def write(self, rows: Tensor, mask: Tensor, cache: DynamicCache, of_row: Tensor) -> None:
        start = self.filled - mask.shape[1]
        self.held_mask[rows] = nn.functional.pad(mask, (start, self.held_mask.shape[1] - self.filled))
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            if new.is_initialized:
                for held, states in zip(layer.held, (new.keys, new.values), strict=True):
                    held[rows, :, start : self.filled] = states[of_row, :, : mask.shape[1]]

    def drop(self, columns: int) -> None:
        left = self.filled - columns
        for held in (each for layer in self._layers() for each in layer.held):
            held[:, :, :left] = held[:, :, columns : self.filled].clone()
        self.held_mask[:, :left] = self.held_mask[:, columns : self.filled].clone()
        self.held_mask[:, left:] = False
        self.filled = left
        self.column -= columns

    def _layers(self) -> list[StaticLayer]:
        return [layer for layer in self.cache.layers if layer.is_initialized]


class Graphs:
    """One recorded step for each key, all in one pool of memory: no two of them ever run at once."""

    def __init__(self, device: torch.device) -> None:
        self.records = device.type == "cuda"
        self.aside = torch.cuda.Stream(device) if self.records else None
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.runs: Counter[Hashable] = Counter()
        self.pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Take a step, replayed where it is recorded; it has to be the same kernels whenever the key is the same."""
        if self.records and key not in self.graphs:
            self.runs[key] += 1
            if self.runs[key] > WARM_UP:
                self._record(key, step)
        if key in self.graphs:
            self.graphs[key].replay()
        elif self.records and self.runs[key] == WARM_UP:
            self._step_watched(step)
        elif self.records:
            self._step_aside(step)
        else:
            step()

    def _record(self, key: Hashable, step: Callable[[], None]) -> None:
        """Record a step without taking it. A model that cannot be recorded continues kernel by kernel."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer stream is the current one: where recording fails, PyTorch leaves its own in its place.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, pool=self.pool):
                step()
        except RuntimeError as error:
            self.records = False
            warnings.warn(f"decoding continues without CUDA graphs, which could not be recorded: {error}", stacklevel=2)
            return
        self.graphs[key], self.pool = graph, graph.pool()

    def _step_watched(self, step: Callable[[], None]) -> None:
        """The last step before recording: a model that waits for the device is not recorded.

        A recording that fails leaves PyTorch's random generator of the device unusable in this process (torch 2.11), so
        waits are found before one is tried.
        """
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._step_aside(step)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = [str(each.message) for each in said if "synchronizing CUDA operation" in str(each.message)]
        if waits:
            self.records = False
            warnings.warn(f"decoding continues without CUDA graphs, because the model waits: {waits[0]}", stacklevel=2)

    def _step_aside(self, step: Callable[[], None]) -> None:
        """A step on a stream of its own, as recording needs it beforehand."""
        self.aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.aside):
            step()
        torch.cuda.current_stream().wait_stream(self.aside)


class GraphState:
    """All that recorded steps are bound to, kept by an engine from one rollout to the next."""

    def __init__(self, model: nn.Module, slots: Slots, layers: int, width: int) -> None:
        """Room for as many slots as given, their longest responses, and ``width`` columns."""
        self.slots = Slots(*(each.clone() for each in slots.fields()))
        self.width, self.weights = width, weight_addresses(model)
        self.kv_cache = StaticBatchKVCache(model, layers, len(slots), width, slots.row.device)
        self.graphs = Graphs(slots.row.device)

    def fits(self, model: nn.Module, slots: Slots, width: int) -> bool:
        """Whether such a rollout finds room, and the weights where they were."""
        room = len(slots) <= len(self.slots) and width <= self.width
        return room and slots.ids.shape[1] == self.slots.ids.shape[1] and weight_addresses(model) == self.weights


def weight_addresses(model: nn.Module) -> list[tuple[int, torch.dtype]]:
    """Where a model's weights are."""
    return [(each.data_ptr(), each.dtype) for each in model.parameters()]


class GraphStore:
    """What is recorded for one engine, kept from one rollout to the next."""

    def __init__(self) -> None:
        self.held: GraphState | None = None

    def fitting(self, model: nn.Module, slots: Slots, layers: int, width: int) -> GraphState:
        """What is held where such a rollout fits in, otherwise new tensors, for which the old ones are freed first."""
        if self.held is None or not self.held.fits(model, slots, width):
            self.held = None
            self.held = GraphState(model, slots, layers, width)
        return self.held


class StaticDecoding(Decoding):
    """`Decoding` by recorded steps."""

    def __init__(self, store: GraphStore, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.store = store

    def _begin(self, slots: Slots, mask: Tensor, cache: DynamicCache, of_row: Tensor) -> None:
        refilled = self.size < len(self.prompt_ids)
        # Where slots are refilled, what no one needs is dropped once it is a block, and looked for once a block.
        spare = self.look_every + (2 * WIDTH if refilled else 0)
        width = -(-(mask.shape[1] + slots.ids.shape[1] + spare) // WIDTH) * WIDTH
        held = self.store.fitting(self.context.model, slots, len(cache.layers), width)
        self.slots = held.slots.front(len(slots))
        self.slots.put(slice(None), slots)
        self.kv_cache, self.graphs = held.kv_cache, held.graphs
        self.kv_cache.begin(mask, cache, of_row)

    def _retire_and_refill(self) -> bool:
        more = super()._retire_and_refill()
        if more:
            self.shape = len(self.slots), self.kv_cache.visible_columns(self.kv_cache.filled + self.look_every)
        return more

    def _step(self) -> None:
        self.graphs.run(self.shape, self._chosen_step)
        self.kv_cache.filled += 1

    def _chosen_step(self) -> None:
        """A step by the kernels that are best for one token; a recorded one keeps them."""
        with cudnn_for_decoding(self.slots.row.device):
            super()._step()

    def _slot_budget(self, rows: int) -> int:
        return min(len(self.slots), max(FEWEST_SLOTS, 1 << (rows - 1).bit_length()))
