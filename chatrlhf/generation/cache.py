"""Key/value layers that are written in place: transformers' own are copied whole at each token."""

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

    The model gets the whole width and a mask that hides what is not written yet: so the tensors stay contiguous
    (a view of the written part would be copied before each product) and only every 32nd token makes them grow.
    Room is filled with zeros, since a hidden NaN is still NaN behind a product.
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

    def _selected(self, store: Tensor, indices: Tensor) -> Tensor:
        rows = len(indices)
        target = store[:rows] if rows <= len(store) else _room(store, rows, store.shape[2])
        return _filled(target, store[indices, :, : self.length])


def make_cache(config: Any) -> DynamicCache:
    """The cache that a model of this configuration asks for, with its plain layers written in place.

    Layers of another kind (a sliding window, a recurrent state) stay transformers' own.
    """
    cache = DynamicCache(config=config)
    cache.layers = [BlockLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _room(like: Tensor, rows: int, width: int) -> Tensor:
    return torch.zeros(rows, like.shape[1], width, like.shape[3], dtype=like.dtype, device=like.device)


def _filled(target: Tensor, written: Tensor) -> Tensor:
    target[:, :, : written.shape[2]] = written
    return target
