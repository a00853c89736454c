"""What flows through the RL stage, and the law every tensor in it obeys.

    JSON record -> PromptBatch -> Rollout -> ScoredRollout -> Experience -> minibatch

Shape legend: ``B`` sequences, ``P`` prompt tokens, ``R`` response tokens, ``V`` vocabulary.

The alignment law
-----------------
* ``logprobs[:, t]`` is log pi(response_t | prompt, response_<t): same index as the token it scores.
* ``values[:, t]`` is V of the state *before* token t is emitted.
* ``rewards[:, t]``, ``advantages[:, t]`` and ``returns[:, t]`` belong to the act of emitting token t.
* Masks are bool and True marks a real token. They are made by the engine that sampled the tokens and
  never inferred from a pad id, so ``pad == eos`` is harmless. A response's mask is a prefix of ones.
* EOS is a real token. The score of a sequence lands on its last real token, EOS included.
* A response cut by its length limit is terminal: no value is bootstrapped behind it.
* A stop string's tokens stay in the mask; only the *text* handed to a reward drops them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chatrlhf.conversation import Prompt


@dataclass
class PromptBatch:
    """Prompts as the rollout engine takes them."""

    input_ids: Tensor  # [B, P] int64, left-padded
    attention_mask: Tensor  # [B, P] bool, True = a real prompt token
    group_ids: Tensor  # [B] int64, rows that sample the same prompt share an id
    prompts: list[Prompt]  # B, as they stand in the data (untemplated)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def texts(self) -> list[str]:
        """The prompts as one text each, for reward functions and people."""
        return [prompt.text for prompt in self.prompts]

    def select(self, index: Tensor) -> PromptBatch:
        """Rows ``index`` ([N] int64) as a batch of the same type."""
        prompts = [self.prompts[i] for i in index.tolist()]
        return PromptBatch(self.input_ids[index], self.attention_mask[index], self.group_ids[index], prompts)


@dataclass
class Rollout:
    """Prompts with one sampled response each."""

    prompts: PromptBatch
    response_ids: Tensor  # [B, R] int64, right-padded
    response_mask: Tensor  # [B, R] bool, a prefix of ones in each row
    sampling_logprobs: Tensor  # [B, R] float32, as the sampler computed them; 0 where masked
    finished: Tensor  # [B] bool, True = ended by EOS or a stop string, False = cut by length
    min_new_tokens: Tensor  # [B] int64, EOS was forbidden before this many response tokens
    completions: list[str]  # B response texts, without EOS and stop string

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Real response tokens of each row, [B] int64."""
        return self.response_mask.sum(dim=1)


@dataclass
class ScoredRollout:
    """A rollout with everything the estimators need to know about it."""

    rollout: Rollout
    scores: Tensor  # [B] float32, clipped, scaled and with the missing-EOS penalty
    raw_scores: Tensor  # [B] float32, as the reward model or function gave them
    old_logprobs: Tensor  # [B, R] float32, the policy's before the update, by the update's own forward
    ref_logprobs: Tensor  # [B, R] float32, the frozen reference's
    values: Tensor | None  # [B, R] float32, None where the algorithm needs no critic
    entropy: float  # mean entropy of the policy at the response positions, nats per token
    trunk_states: Tensor | None = None  # see Experience
    trunk_rows: Tensor | None = None

    @property
    def kl_to_reference(self) -> float:
        """Mean KL(policy || reference) in nats per sequence, by the k1 estimate summed over tokens: the controller's.

        Of few samples it may be negative.
        """
        mask = self.rollout.response_mask
        return float(((self.old_logprobs - self.ref_logprobs) * mask).sum(dim=1).mean())


@dataclass
class Experience:
    """What the update learns from. ``select`` gives a minibatch of the same type."""

    prompt_ids: Tensor  # [B, P] int64, left-padded
    prompt_mask: Tensor  # [B, P] bool
    response_ids: Tensor  # [B, R] int64, right-padded
    response_mask: Tensor  # [B, R] bool
    min_new_tokens: Tensor  # [B] int64, part of the distribution that was sampled
    old_logprobs: Tensor  # [B, R] float32
    ref_logprobs: Tensor  # [B, R] float32, for a KL term in the loss
    sampling_logprobs: Tensor  # [B, R] float32
    advantages: Tensor  # [B, R] float32, 0 where masked
    returns: Tensor | None  # [B, R] float32, None without a critic
    old_values: Tensor | None  # [B, R] float32, None without a critic
    # [B, T, d] in the model's precision, each row's prompt and response from the left, T those of the longest row: what
    # a frozen trunk made of them, so that no epoch runs it again. None where nothing is frozen.
    trunk_states: Tensor | None = None
    # With several processes each keeps the states of rows it sampled: [B] int64, where in `trunk_states` those of a row
    # are, -1 where another process has them. None: they stand row by row.
    trunk_rows: Tensor | None = None

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    def select(self, index: Tensor) -> Experience:
        """Rows ``index`` ([N] int64) as an Experience."""
        picked = {
            field.name: None if (value := getattr(self, field.name)) is None else value[index]
            for field in dataclasses.fields(self)
            if self.trunk_rows is None or field.name != "trunk_states"
        }
        return Experience(**{"trunk_states": self.trunk_states} | picked)

    @property
    def own_trunk_states(self) -> Tensor | None:
        """The states of these rows, row by row, where there are any and all of them lie here."""
        if self.trunk_states is None or self.trunk_rows is None:
            return self.trunk_states
        return self.trunk_states[self.trunk_rows]

    def to(self, device: torch.device | str) -> Experience:
        """The same experience on ``device``."""
        moved: dict[str, Any] = {
            field.name: None if (value := getattr(self, field.name)) is None else value.to(device)
            for field in dataclasses.fields(self)
        }
        return Experience(**moved)
