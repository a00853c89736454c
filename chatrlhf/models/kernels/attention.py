"""Attention over padded rows or over rows packed into one stream; on a CPU fast on short ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chatrlhf.compat import attention_of, softmax_backward

NAME = "chatrlhf"

# PyTorch's fused attention on a CPU is made for long sequences. With plain matrix products a PPO update of 16
# sequences of 96 tokens took 0.8 of the time, decoding 0.6 of it, in bfloat16; forwards of 250 tokens half the time
# in float32. Longer ones were not measured.
SHORT = 256
# And on which devices: a GPU's fused attention is made for short sequences, too.
MATMUL_DEVICES = {"cpu"}


@dataclass(frozen=True)
class Segments:
    """Where the rows of a packed stream lie. M tokens in the stream, B rows of at most W tokens.

    Every slot of [B, W] without a token takes the stream's last token, which belongs to no row and has no
    gradient; every token of no row is read back from such an empty slot. So both ways are plain selections.
    """

    slots: Tensor  # [B*W] int64, stream position of each slot
    tokens: Tensor  # [M] int64, slot of each stream position
    rows: int
    width: int


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers asks of an attention function: [B, h, T, e] each, to [B, T, h, e].

    Args:
        attention_mask: added to the scores, [B, 1, T, width], or bool on a GPU (True = seen); None for causal, or for
            all in a model that is not.
        segments: the batch is one packed stream, [1, h, M, e]; the mask is of no meaning then.
        position_bias: T5's, added to the scores, [1 or B, h, T, width]. It is trained, as no mask is, so transformers'
            own function takes it.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is not None:
        if key.shape[1] < query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        # Heads first: the rows of a head lie side by side already.
        q, k, v = (_Gather.apply(x, segments.slots, segments.tokens) for x in (query, key, value))
        q, k, v = (x.reshape(-1, segments.rows, segments.width, x.shape[-1]) for x in (q, k, v))
        if _by_products(q, dropout):
            mixed = _plain(q, k, v, _causal(segments.width, sliding_window, q.dtype, q.device), scaling)
        else:
            mask = None if sliding_window is None else _causal(segments.width, sliding_window, q.dtype, q.device)
            mixed = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling
            )
        mixed = mixed.reshape(1, mixed.shape[0], -1, mixed.shape[-1])
        return _Gather.apply(mixed, segments.tokens, segments.slots).transpose(1, 2), None
    if position_bias is not None or not _by_products(query, dropout):
        batch, heads, length, size = query.shape
        if position_bias is None and length == 1 and key.shape[1] < heads:
            # Query heads that share a key head stand as its queries; transformers would write keys and values out for
            # each of them, at every token.
            query = query.reshape(batch, key.shape[1], -1, size)
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attention_mask, dropout, scale=scaling
            )
            return mixed.reshape(batch, 1, heads, value.shape[-1]), None
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            position_bias=position_bias,
            **kwargs,
        )
    if attention_mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # Queries are the last positions of what they look at.
        attention_mask = _causal(key.shape[2], None, query.dtype, query.device)[:, :, -query.shape[2] :]
    elif attention_mask is None:
        attention_mask = query.new_zeros(1, 1, query.shape[2], key.shape[2])
    return _plain(query, key, value, attention_mask, scaling).transpose(1, 2), None


def additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    """transformers' mask as a number to add, and none where plain causality says it all; as it is for a GPU."""
    allowed = sdpa_mask(*args, **kwargs)
    if allowed is None or allowed.device.type not in MATMUL_DEVICES:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, additive_mask)


def patch_attention(model: nn.Module, device: torch.device) -> None:
    """Have a model use `attention`, which takes packed rows and, on a CPU, is fast on short ones.

    Only a model that would use PyTorch's fused kernel is changed: another choice was somebody's own. And none that
    caps its attention scores (Gemma 2), which the fused kernel leaves out: the stages before ran without, too.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    fused = attention_of(model.config) == "sdpa"
    if device.type in ("cpu", "cuda") and fused and not capped:
        model.set_attn_implementation(NAME)


@contextmanager
def cudnn_for_decoding(device: torch.device) -> Iterator[None]:
    """Inside, PyTorch may take cuDNN's attention on Hopper: for one token a row over few, recorded shapes.

    There its plans are made once, and it is 1.3 (8 key heads) to 2.6 times (32) as fast as what PyTorch takes otherwise
    (256 rows, 512 columns, bfloat16, H200). Not on Blackwell, where it corrupts rows (pytorch issue 193893).
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(before or hopper)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@contextmanager
def use_matmul_on(device_types: set[str]) -> Iterator[None]:
    """Inside, attention is by products on these devices: a plan for a GPU is made on a CPU."""
    own = set(MATMUL_DEVICES)
    try:
        _set_to(MATMUL_DEVICES, device_types)
        _causal.cache_clear()  # tensors of a plan and those of a run are of no use to each other
        yield
    finally:
        _set_to(MATMUL_DEVICES, own)
        _causal.cache_clear()


def _set_to(names: set[str], others: set[str]) -> None:
    names.clear()
    names.update(others)


def _by_products(query: Tensor, dropout: float) -> bool:
    """Whether queries [., h, T, e] are few enough for plain products."""
    return query.device.type in MATMUL_DEVICES and query.shape[2] <= SHORT and not dropout


def _plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k' + bias) v by plain products: [B, h, T, e] over keys [B, h / groups, width, e].

    Args:
        bias: [B or 1, 1, T, width], or what can be expanded to that: a stream's in a model that loses its segments.
    """
    batch, heads, length, size = query.shape
    kv_heads, width = key.shape[1:3]
    groups = heads // kv_heads
    if len(bias) > 1 or groups > 1:
        bias = bias.expand(batch, kv_heads, length, width)[:, :, None].expand(-1, -1, groups, -1, -1)
    else:
        bias = bias.expand(-1, -1, length, width)
    # The query heads that share a key head stand below each other, as more rows of its product.
    folded = _PlainAttention.apply(
        query.reshape(batch * kv_heads, groups * length, size),
        key.reshape(batch * kv_heads, width, size),
        value.reshape(batch * kv_heads, width, value.shape[-1]),
        bias.reshape(-1, groups * length, width),
        scaling,
    )
    return folded.view(batch, heads, length, value.shape[-1])


class _PlainAttention(torch.autograd.Function):
    """Two products and a softmax, four products back, with nothing converted or copied between them.

    In bfloat16 the softmax rounds its result only, as the usual way through a float32 copy does.
    """

    @staticmethod
    def forward(ctx, query, key, value, bias, scaling):
        scores = torch.bmm(query, key.transpose(1, 2))
        torch.add(bias, scores, alpha=scaling, out=scores)
        shares = scores.softmax(dim=-1)
        ctx.save_for_backward(query, key, value, shares)
        ctx.scaling = scaling
        return torch.bmm(shares, value)

    @staticmethod
    def backward(ctx, of_mixed):
        query, key, value, shares = ctx.saved_tensors
        of_mixed = of_mixed.contiguous()
        of_shares = torch.bmm(of_mixed, value.transpose(1, 2))
        of_scores = softmax_backward(of_shares, shares, -1)
        of_query = torch.bmm(of_scores, key).mul_(ctx.scaling)
        of_key = torch.bmm(of_scores.transpose(1, 2), query).mul_(ctx.scaling)
        return of_query, of_key, torch.bmm(shares.transpose(1, 2), of_mixed), None, None


class _Gather(torch.autograd.Function):
    """[1, h, X, e] to [1, h, len(index), e]: one of the two directions of `Segments`, whose gradient is the other.

    A general selection would have to add up.
    """

    @staticmethod
    def forward(ctx, states, index, inverse):
        ctx.save_for_backward(inverse)
        return states.index_select(2, index)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(2, inverse), None, None


@lru_cache(maxsize=16)
def _causal(width: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What hides a later position, or one that lies ``window`` or more behind; [1, 1, width, width]."""
    hidden = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    mask = torch.zeros(1, 1, width, width, dtype=dtype, device=device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)
