"""How long a stage takes: its FLOP and bytes over what the hardware gives of them.

A forward of one row over S tokens with logits at n of them is

    F(S, n) = 2 N S + 2 L d S^2 + 2 d V n        FLOP

N the weights in matrix products, L blocks, d the width of attention, V the vocabulary; attention counted once over the
triangle. A backward is two forwards, or one where the weights are frozen and only states have a gradient; activations
that are not kept cost a forward more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chatrlhf.planning.hardware import Device

# Shares of a device's peak that are assumed, of products and of its bandwidth in decoding. Well-tuned runs reach them;
# adapters, short rows and weights in few bits reach less.
UTILISATION, OF_BANDWIDTH = 0.4, 0.6


@dataclass(frozen=True)
class Dimensions:
    """What the bound needs to know of a model."""

    products: int
    layers: int
    width: int
    hidden: int
    vocab: int

    @classmethod
    def of(cls, products: int, settings: Any) -> Dimensions:
        """From a transformers configuration."""
        text = settings.get_text_config()
        heads = text.num_attention_heads
        width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
        return cls(products, text.num_hidden_layers, width, text.hidden_size, text.vocab_size)

    def forward(self, tokens: float, logits: float) -> float:
        """F(S, n), FLOP."""
        attention = 2 * self.layers * self.width * tokens**2
        return 2 * self.products * tokens + attention + 2 * self.hidden * self.vocab * logits


def training_forwards(share_trained: float, checkpointing: bool) -> float:
    """Forwards that a forward and its backward are worth.

    Args:
        share_trained: of the weights in matrix products.
    """
    return 2 + share_trained + checkpointing


def seconds(flop: float, device: Device, in_bf16: bool, ranks: int) -> float | None:
    """Of products, dealt out over devices; None where the device's peak is not known."""
    peak = device.peak if in_bf16 else device.peak_fp32
    return flop / (peak * UTILISATION * ranks) if peak else None


def decoding_seconds(read: float, device: Device, flop: float, in_bf16: bool) -> float | None:
    """Of rollouts on one device: bytes that are read, or FLOP, whichever takes longer."""
    by_products = seconds(flop, device, in_bf16, 1)
    if device.bandwidth is None:
        return by_products
    by_reading = read / (device.bandwidth * OF_BANDWIDTH)
    return max(by_reading, by_products) if by_products is not None else by_reading
