"""Rows of many lengths packed behind each other into one stream: nothing is computed on padding."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.compat import attention_of
from chatrlhf.models.kernels.attention import NAME, Segments
from chatrlhf.models.traits import traits_of

# Matrix products are compiled for their shape when it is first seen: on the CPU measured that took ten times as long
# as the product. So shapes are made of whole quanta (rows of a product) and blocks (positions of a row).
BUCKET, BLOCK = 64, 32


@dataclass(frozen=True)
class Stream:
    """B rows of right-padded ids as one row of M tokens; the last of them belong to none and fill a quantum."""

    inputs: dict[str, Any]  # what a transformers model is called with
    positions_of: Tensor  # [B*T] int64: where each position of the padded rows stands in the stream
    padded_of: Tensor  # [M] int64: the other way, 0 for what belongs to no row


def pack(input_ids: Tensor, attention_mask: Tensor) -> Stream | None:
    """Right-padded rows, [B, T] each, as a stream; None if the padded rows are no more than the stream would be."""
    rows, longest = attention_mask.shape
    lengths = attention_mask.sum(dim=1)
    total = int(lengths.sum())
    size = _whole(total + 1)
    if rows * longest <= size:
        return None
    device, width = input_ids.device, _up(longest, BLOCK)
    places = torch.arange(width, device=device)
    real = places < lengths[:, None]  # [B, W]
    starts = lengths.cumsum(dim=0) - lengths
    slots = torch.where(real, starts[:, None] + places, size - 1)
    # An empty slot exists: the rows differ in length, or fewer tokens would be needed padded.
    tokens = torch.full((size,), int((~real).reshape(-1).to(torch.uint8).argmax()), device=device)
    tokens[:total] = real.reshape(-1).nonzero().squeeze(-1)
    ids, positions = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))
    ids[:total] = input_ids[attention_mask]
    positions[:total] = places.expand(rows, -1)[real]
    inputs = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        # Four dimensions: a mask that is made already. `attention` goes by the segments instead.
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "segments": Segments(slots.reshape(-1), tokens, rows, width),
    }
    padded_of = torch.zeros(size, dtype=torch.long, device=device)
    padded_of[:total] = attention_mask.reshape(-1).nonzero().squeeze(-1)
    return Stream(inputs, slots[:, :longest].reshape(-1), padded_of)


@torch.no_grad()
def supports_packing(backbone: nn.Module) -> bool:
    """Whether a model gives packed rows the states that it gives padded ones.

    It has to use `attention` and to take positions; whether all that it needs to know arrives is tried once, on
    a few tokens, and the answer kept with the model. Not so with ALiBi (BLOOM), or where scores are capped (Gemma 2).
    """
    uses_ours = attention_of(getattr(backbone, "config", None)) == NAME
    if not uses_ours or "position_ids" not in inspect.signature(backbone.forward).parameters:
        return False
    traits = traits_of(backbone)
    if traits.packed_is_padded is None:
        traits.packed_is_padded = _packed_is_padded(backbone)
    return traits.packed_is_padded


def pad_to_multiple(slots: Tensor) -> Tensor:
    """[N] indices with zeros behind them, up to a whole number of quanta."""
    return nn.functional.pad(slots, (0, _whole(len(slots)) - len(slots)))


def _packed_is_padded(backbone: nn.Module) -> bool:
    weight = next(backbone.parameters())
    ids = torch.arange(16 * 6, device=weight.device).view(16, 6) % backbone.config.get_text_config().vocab_size
    mask = (
        torch.arange(6, device=weight.device) < torch.tensor([6, *[1, 2, 3, 4, 5] * 3], device=weight.device)[:, None]
    )
    training = backbone.training
    backbone.eval()
    stream = pack(ids, mask)
    padded = backbone(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1).float()
    packed = backbone(**stream.inputs, use_cache=False).last_hidden_state[0, stream.positions_of].float()
    backbone.train(training)
    mask = mask.reshape(-1)
    # Rounding, and nothing else: a model that mixed rows or lost positions is off by far more, even when it is new.
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return bool((packed[mask] - padded[mask]).abs().max() <= tolerance * padded[mask].abs().max())


def _whole(length: int) -> int:
    """In quanta that grow with the length: eight lengths from each power of two to the next."""
    return _up(length, max(BUCKET, 2 ** (length.bit_length() - 1) // 8))


def _up(value: int, to: int) -> int:
    return -(-value // to) * to
