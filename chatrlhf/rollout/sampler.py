"""What the trainer asks of whatever samples its rollouts."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from chatrlhf.types import PromptBatch, Rollout


class Sampler(Protocol):
    """`RolloutEngine` here, or vLLM behind `VllmSampler`; a rollout of either obeys the alignment law."""

    def generate(self, prompts: PromptBatch, seed: int, rows: Tensor | None = None) -> Rollout:
        """One response to each of these rows, or to all, drawn from the policy as it is now."""
        ...
