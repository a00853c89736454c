"""What the trainer asks of whatever samples its rollouts."""

from __future__ import annotations

from typing import Protocol

from chatrlhf.types import PromptBatch, Rollout


class Sampler(Protocol):
    """`RolloutEngine` here, or vLLM behind `VllmSampler`; a rollout of either obeys the alignment law."""

    def generate(self, prompts: PromptBatch, seed: int) -> Rollout:
        """One response a row, drawn from the policy as it is now."""
        ...
