"""How long a stage takes: its FLOP and bytes over what the hardware gives of them.

A forward of one row over S tokens with logits at n of them is

    F(S, n) = 2 N S + 2 L d S^2 + 2 d V n        FLOP

N the weights in matrix products, L blocks, d the width of attention, V the vocabulary; attention counted once over the
triangle. Of an encoder–decoder S - n tokens are read by the encoder, each of which sees all of them, and n by the
decoder, which sees all of those and the triangle of its own:

    F(S, n) = 2 N_e (S - n) + 4 L d (S - n)^2 + 2 N_d n + 4 L d n (S - n) + 2 L d n^2 + 2 d V n        FLOP

A backward is two forwards, or one where the weights are frozen and only states have a gradient; activations
that are not kept cost a forward more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatrlhf.tools.plan.hardware import Device

# Shares of a device's peak that are assumed, of products and of its bandwidth in decoding. Well-tuned runs reach them;
# adapters, short rows and quantized weights reach less.
UTILISATION, OF_BANDWIDTH = 0.4, 0.6


@dataclass(frozen=True)
class Dimensions:
    """What the bound needs to know of a model."""

    products: int
    layers: int  # of an encoder–decoder, of either
    width: int
    cached: int  # of the width, what keys have, or values
    hidden: int
    vocab: int
    in_encoder: int = 0  # of the products

    @classmethod
    def of(cls, products: int, settings: Any, in_encoder: int = 0) -> Dimensions:
        """From a transformers configuration."""
        text = settings.get_text_config()
        heads = text.num_attention_heads
        size = getattr(text, "head_dim", None) or text.hidden_size // heads
        cached = size * (getattr(text, "num_key_value_heads", None) or heads)
        return cls(
            products, text.num_hidden_layers, size * heads, cached, text.hidden_size, text.vocab_size, in_encoder
        )

    def forward(self, tokens: float, logits: float) -> float:
        """F(S, n), FLOP."""
        return self.states(tokens, logits) + 2 * self.hidden * self.vocab * logits

    def states(self, tokens: float, reply: float) -> float:
        """F(S, n) without the head; ``reply`` is n, of which a model that reads all as one knows nothing."""
        square = 2 * self.layers * self.width
        if not self.in_encoder:
            return 2 * self.products * tokens + square * tokens**2
        prompt = tokens - reply
        encoder = 2 * self.in_encoder * prompt + 2 * square * prompt**2
        return encoder + 2 * self.in_decoder * reply + square * (2 * reply * prompt + reply**2)

    @property
    def in_decoder(self) -> int:
        """Weights in the products of a token that is decoded."""
        return self.products - self.in_encoder


def training_forwards(share_trained: float, checkpointing: bool) -> float:
    """Forwards that a forward and its backward are worth.

    Args:
        share_trained: of the weights in matrix products.
    """
    return 2 + share_trained + checkpointing


def seconds(flop: float, device: Device, in_bf16: bool, ranks: int) -> float | None:
    """Of products, split over devices; None where the device's peak is not known."""
    peak = device.peak if in_bf16 else device.peak_fp32
    return flop / (peak * UTILISATION * ranks) if peak else None


def decoding_seconds(read: float, device: Device, flop: float, in_bf16: bool) -> float | None:
    """Of rollouts on one device: bytes that are read, or FLOP, whichever takes longer."""
    by_products = seconds(flop, device, in_bf16, 1)
    if device.bandwidth is None:
        return by_products
    by_reading = read / (device.bandwidth * OF_BANDWIDTH)
    return max(by_reading, by_products) if by_products is not None else by_reading
