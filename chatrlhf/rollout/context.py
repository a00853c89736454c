"""What decoding shares: limits of a rollout, and the context that each decoder reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution


@dataclass
class Limits:
    """How long a response may and must be. Lengths count tokens; both kinds of bound may be given."""

    max_new_tokens: int
    max_length: int  # prompt and response together: the context, or less
    min_new_tokens: int = 0
    min_length: int = 0  # prompt and response together

    def per_row(self, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(most, fewest) response tokens of each row, both [B] int64.

        Raises:
            ValueError: a prompt leaves no room for a token; callers drop such prompts beforehand.
        """
        max_new_tokens = (self.max_length - prompt_lengths).clamp(max=self.max_new_tokens)
        if bool((max_new_tokens < 1).any()):
            raise ValueError(f"a prompt of {int(prompt_lengths.max())} tokens leaves no room in {self.max_length}")
        min_new_tokens = (self.min_length - prompt_lengths).clamp(min=self.min_new_tokens)
        return max_new_tokens, torch.minimum(min_new_tokens, max_new_tokens)


@dataclass(frozen=True)
class DecodeContext:
    """What every decoder reads and none changes: the model, what may be sampled, and when a response ends."""

    model: nn.Module
    distribution: SamplingDistribution
    limits: Limits
    stop: list[str]
    decode: Callable[[list[int]], str]  # response ids without EOS to text
    look_every: int | None  # steps between two checks for ended rows; None: the device's default
    takes_positions: bool  # some families (BLOOM) derive positions from the mask and take none
    keep_last: dict[str, Any]  # arguments of a forward that computes the last position's logits alone
    in_place: bool  # the cache is written in place, so that a slot can be refilled
    step: Callable[[Tensor, Tensor, Tensor, Any], Tensor] | None = None  # a token's step without the model's modules


def forward_arguments(model: nn.Module) -> tuple[bool, dict[str, Any]]:
    """Whether a model's forward takes position ids, and what makes it compute the last position's logits alone."""
    parameters = inspect.signature(model.forward).parameters
    return "position_ids" in parameters, {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
