"""Rows of embeddings and head for tokens that were added when adapters were trained.

Whoever adds tokens saves the whole embeddings (and the head) with the adapters, or the rows of those tokens
(`trainable_token_indices`). Their base has fewer rows, or, where it is padded, more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from chatrlhf.models.loading.backbone import head_stays_apart
from chatrlhf.models.loading.weight_files import Header

PREFIX = "base_model.model."  # of names in a file of adapters


def give_rows(model: nn.Module, settings: Any, held: Mapping[str, Header]) -> None:
    """Give a model as many rows as its adapters were trained with. What they do not fill is NaN: see `unfilled`.

    Args:
        settings: peft's, of the adapters.
        held: the tensors in their file.
    """
    rows = model.get_input_embeddings().num_embeddings
    wanted = _rows_of(model, settings, held)
    if wanted in (None, rows):
        return
    with head_stays_apart(model):
        # Without the mean of the old rows: it is not used.
        model.resize_token_embeddings(wanted, mean_resizing=False)
    with torch.no_grad():
        for layer in _layers(model).values():
            for weight in layer.parameters(recurse=False):
                weight[rows:] = torch.nan


def unfilled(model: nn.Module) -> list[str]:
    """Names of the embeddings and the head where rows are left that no adapters have filled."""
    return [
        name
        for name, layer in _layers(model).items()
        if not all(torch.isfinite(weight.sum(dtype=torch.float32)) for weight in layer.parameters(recurse=False))
    ]


def _rows_of(model: nn.Module, settings: Any, held: Mapping[str, Header]) -> int | None:
    """The rows that the adapters were trained with; None where they do not say."""
    names = tuple(f"{PREFIX}{name}." for name in _layers(model))
    shapes = {name: header.shape for name, header in held.items() if name.startswith(names)}
    matrices = {shape[0] for name, shape in shapes.items() if name.endswith("weight") and ".lora_" not in name}
    factors = {shape[1] for name, shape in shapes.items() if name.endswith("lora_embedding_A")}
    factors |= {shape[0] for name, shape in shapes.items() if name.endswith("lora_B.weight")}
    tokens = getattr(settings, "trainable_token_indices", None) or getattr(settings, "token_indices", None) or []
    indices = [index for group in (tokens.values() if isinstance(tokens, dict) else [tokens]) for index in group]
    rows = model.get_input_embeddings().num_embeddings
    added = {max(indices) + 1} if indices and max(indices) >= rows else set()
    return max(matrices or factors or added, default=None)


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """The embeddings, and the head where there is one, by their names."""
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return {name: module for name, module in model.named_modules() if any(module is layer for layer in both)}
