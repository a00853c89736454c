"""What is remembered of the rows in flight: key/value layers that are written in place, and the mask over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

BLOCK = 32


def width_for(length: int) -> int:
    """Positions that a layer holding ``length`` of them shows to the model: whole blocks."""
    return -(-length // BLOCK) * BLOCK


class BlockLayer(DynamicLayer):
    """One attention layer's keys and values, [rows, heads, width, head size], with room for up to a block more.

    transformers' own layers are copied whole at each token. Here the model gets the whole width and a mask that hides
    what is not written yet: so the tensors stay contiguous (a view of the written part would be copied before each
    product) and only every 32nd token makes them grow. Room is filled with zeros, since a hidden NaN is still NaN
    behind a product.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (_room(states, len(states), 0) for states in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new positions behind the old ones; returns all, with room as `get_mask_sizes` says."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self.length = self.length, self.length + key_states.shape[2]
        if self.length > self.keys.shape[2]:
            self.keys, self.values = (
                _filled(_room(old, len(old), width_for(self.length)), old[:, :, :start])
                for old in (self.keys, self.values)
            )
        self.keys[:, :, start : self.length] = key_states
        self.values[:, :, start : self.length] = value_states
        return (self.keys, self.values) if start else (key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Width and offset of what the mask has to cover once ``query_length`` positions have been added.

        The first positions, the prompt's, are shown without room behind them: they are what a causal kernel
        takes without a mask.
        """
        return (width_for(self.length + query_length) if self.length else query_length), 0

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Rows ``indices``: fewer move to the front in place, more (copies of a row) get room of their own."""
        if not self.is_initialized:
            return
        self.keys, self.values = (self._selected(each, indices) for each in (self.keys, self.values))

    def write(self, rows: Tensor, start: int, keys: Tensor, values: Tensor) -> None:
        """Give rows (their indices, int64) other keys and values from column ``start`` on."""
        end = start + keys.shape[2]
        self.keys[rows, :, start:end], self.values[rows, :, start:end] = keys, values

    def drop(self, columns: int) -> None:
        """Forget the first columns, whole blocks of them, of all rows; room for the next one is made."""
        if not self.is_initialized:
            return
        kept = slice(columns, self.length)
        self.length -= columns
        self.keys, self.values = (
            _filled(_room(old, len(old), width_for(self.length + 1)), old[:, :, kept])
            for old in (self.keys, self.values)
        )

    def _selected(self, store: Tensor, indices: Tensor) -> Tensor:
        rows = len(indices)
        target = store[:rows] if rows <= len(store) else _room(store, rows, store.shape[2])
        return _filled(target, store[indices, :, : self.length])


class BatchKVCache:
    """Keys and values of n rows in flight, and the mask that hides from each what is not its own.

    The rows' newest tokens stand in one column, the last that is filled; what a row has said and its prompt stand
    without a gap before it.
    """

    block = BLOCK

    def __init__(self, cache: DynamicCache, mask: Tensor) -> None:
        """A cache that holds prompts, and their mask, [n, P] bool, left-padded."""
        self.cache, self.mask, self.filled = cache, mask, mask.shape[1]

    def extend(self) -> Tensor:
        """Open the next column; returns the mask for the forward that fills it, [n, width]."""
        if self.filled == self.mask.shape[1]:
            room = width_for(self.filled + 1) - self.filled
            self.mask = torch.nn.functional.pad(self.mask, (0, room))
        self.mask[:, self.filled] = True
        self.filled += 1
        return self.mask

    def grows(self, columns: int) -> bool:
        """Whether so many more columns begin another block."""
        return -(-(self.filled + columns) // self.block) > -(-self.filled // self.block)

    def keep(self, index: Tensor) -> None:
        """Only rows ``index``, int64, are left."""
        self.cache.batch_select_indices(index)
        self.mask = self.mask[index]

    def write(self, rows: Tensor, mask: Tensor, cache: DynamicCache, of_row: Tensor) -> None:
        """Give rows new prompts, whose last column is the one filled last.

        Args:
            rows: [m] int64, which of the n.
            mask: [m, P] bool, left-padded; P is at most what is filled.
            cache: holds the prompts in P columns, equal ones once; empty where P is 0.
            of_row: [m] int64, where in that cache each row's prompt is.
        """
        start = self.filled - mask.shape[1]
        self.mask[rows] = torch.nn.functional.pad(mask, (start, self.mask.shape[1] - self.filled))
        for layer, new in zip(self.cache.layers, cache.layers, strict=True):
            if new.is_initialized:
                layer.write(rows, start, *(each[of_row, :, : mask.shape[1]] for each in (new.keys, new.values)))

    def drop(self, columns: int) -> None:
        """Forget the first columns, whole blocks of them, which no row needs any more."""
        self.mask = self.mask[:, columns:]
        self.filled -= columns
        for layer in self.cache.layers:
            layer.drop(columns)


def make_cache(config: Any) -> DynamicCache:
    """The cache that a model of this configuration asks for, with its plain layers written in place.

    Layers of another kind (a sliding window, a recurrent state) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def all_in_place(cache: DynamicCache) -> bool:
    """Whether rows of such a cache may get new prompts: a window's or a recurrent state's columns cannot be moved."""
    return bool(cache.layers) and all(type(layer) is BlockLayer for layer in cache.layers)


def _room(like: Tensor, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, like.shape[1], width, like.shape[3], dtype=like.dtype, device=like.device)


def _filled(target: Tensor, written: Tensor) -> Tensor:
    target[:, :, : written.shape[2]] = written
    return target
