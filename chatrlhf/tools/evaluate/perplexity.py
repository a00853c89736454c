"""How well models predict a text from contexts of several lengths: the same tokens from each of them.

A window ends at the same place for every length c and gives the model the c tokens before that place; its last
``stride`` tokens are the targets. So what is predicted never changes, only how far back the model can look: a target is
predicted from between c - stride and c - 1 tokens. No BOS is put before a window, which begins in the middle of a text.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.errors import DataError
from chatrlhf.models.loading.rope import positions

TOKENS_AT_ONCE = 8192  # of a batch of windows


@dataclass(frozen=True)
class PerplexityCurve:
    """Perplexities of one model, by context; None where the model has no positions for it."""

    name: str
    positions: int  # what its configuration says that it can take
    perplexity: dict[int, float | None]


def window_ends(tokens: int, longest: int, stride: int, most: int) -> list[int]:
    """Where windows end: ``most`` of them at most, spread evenly over a text, no target in two of them.

    Args:
        tokens: length of the text.
        longest: the longest context, for which every window has room.

    Raises:
        DataError: the text is too short for one window.
    """
    places = list(range(longest, tokens + 1, stride))
    if not places:
        raise DataError(f"the text has {tokens:,} tokens, too few for a context of {longest:,}; give a longer one")
    if len(places) <= most:
        return places
    return [places[i * (len(places) - 1) // max(most - 1, 1)] for i in range(most)]


@torch.no_grad()
def perplexity_curve(
    model: nn.Module,
    ids: Tensor,
    contexts: Sequence[int],
    stride: int,
    ends: Sequence[int],
    name: str = "",
    done: Callable[[], None] = lambda: None,
) -> PerplexityCurve:
    """Perplexity, exp of the mean of -log p over all targets, at each context.

    Args:
        ids: the text, [N] int64.
        contexts: tokens of a window, each longer than ``stride``.
        ends: from `window_ends`.
        done: is called after each context.
    """
    model.eval()
    found: dict[int, float | None] = {}
    for context in contexts:
        found[context] = _perplexity(model, ids, context, stride, ends) if _can_take(model.config, context) else None
        done()
    return PerplexityCurve(name, positions(model.config), found)


def _perplexity(model: nn.Module, ids: Tensor, context: int, stride: int, ends: Sequence[int]) -> float:
    device = next(model.parameters()).device
    windows = torch.stack([ids[end - context : end] for end in ends])
    # A few families compute all logits.
    keep = {"logits_to_keep": stride + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    total = 0.0
    for batch in windows.split(max(TOKENS_AT_ONCE // context, 1)):
        logits = model(input_ids=batch.to(device), use_cache=False, **keep).logits
        logprobs = logits[:, -stride - 1 : -1].float().log_softmax(dim=-1)
        targets = batch[:, -stride:].to(device)
        total -= float(logprobs.gather(2, targets[:, :, None]).double().sum())
    return math.exp(total / (len(ends) * stride))


def _can_take(config: Any, context: int) -> bool:
    """Positions that turn go on for ever, whatever comes of it; those of a table end with it."""
    turns = bool(getattr(config.get_text_config(), "rope_parameters", None))
    return turns or context <= positions(config)
