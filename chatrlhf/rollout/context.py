"""What decoding shares: limits of a rollout, and the context that each decoder reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        most = (self.max_length - prompt_lengths).clamp(max=self.max_new_tokens)
        if bool((most < 1).any()):
            raise ValueError(f"a prompt of {int(prompt_lengths.max())} tokens leaves no room in {self.max_length}")
        fewest = (self.min_length - prompt_lengths).clamp(min=self.min_new_tokens)
        return most, torch.minimum(fewest, most)
