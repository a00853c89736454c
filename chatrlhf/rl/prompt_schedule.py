"""Which prompts each step samples, as a function of seed and step alone, so that a resumed run continues the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import prompt_batch
from chatrlhf.data.epochs import Epochs
from chatrlhf.runtime.seeding import step_generator
from chatrlhf.types import PromptBatch


@dataclass
class PromptSchedule:
    """Endless epochs over the prompts, each in an order of its own.

    A resumed run may have other prompts a step, and continues with the prompt behind the last one that was seen.
    """

    ids_of: Sequence[Sequence[int]]  # token ids of each prompt
    prompts: Sequence[Prompt]
    pad_token_id: int
    prompts_per_step: int
    samples_per_prompt: int
    seed: int
    epochs: Epochs | None = None  # which prompts each epoch sees; None: all
    first_step: int = 0  # at which the run was resumed
    first_prompt: int = 0  # prompts seen before it

    def __post_init__(self) -> None:
        self.seen = self.epochs or Epochs.of_all(len(self.prompts))

    def batch(self, step: int) -> PromptBatch:
        """The prompts of a step (0 = first), each repeated ``samples_per_prompt`` times."""
        first = self.first_prompt + (step - self.first_step) * self.prompts_per_step
        chosen = [self._at(position) for position in range(first, first + self.prompts_per_step)]
        return prompt_batch(
            [self.ids_of[i] for i in chosen],
            [self.prompts[i] for i in chosen],
            self.pad_token_id,
            self.samples_per_prompt,
        )

    def _at(self, position: int) -> int:
        epoch, place = divmod(position, self.seen.size)
        return int(self.seen.of(epoch)[self._order(epoch)[place]])

    def _order(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.seen.size, generator=step_generator(self.seed, epoch, "prompts"))
