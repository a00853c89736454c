"""A rollout with everything the estimators need: scores, log-probabilities, reference, values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatrlhf.functional.masked import masked_mean
from chatrlhf.models.reference import Reference
from chatrlhf.models.sequences import join
from chatrlhf.models.topology import PolicyOnly
from chatrlhf.rl.microbatches import cut_by_length
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import RewardSource
from chatrlhf.types import Rollout, ScoredRollout


@dataclass
class Likelihoods:
    """What the models make of a rollout; [B, R] float32 on the CPU, 0 where masked."""

    logprobs: Tensor  # of the policy
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None  # None without a critic
    trunk_states: Tensor | None = None  # as in Experience, on the device


@dataclass
class Scorer:
    """Scores a rollout once, before the update touches the policy.

    ``old_logprobs`` are recomputed by the same forward that the update uses, so the first ratio is 1 up to
    rounding; the sampler's own stay on the rollout.
    """

    topology: PolicyOnly
    reference: Reference
    reward: RewardSource
    scaling: RewardScaling
    device: torch.device
    micro_batch_size: int = 64

    @torch.no_grad()
    def score(self, rollout: Rollout) -> ScoredRollout:
        """Scores [B] and per-token quantities [B, R], on the CPU; ``micro_batch_size`` longest rows at once."""
        raw_scores = self.reward(rollout)
        scores = self.scaling(raw_scores, rollout.finished)
        read = self.likelihoods(rollout)
        mean_entropy = float(masked_mean(read.entropy, rollout.response_mask))
        return ScoredRollout(
            rollout, scores, raw_scores, read.logprobs, read.ref_logprobs, read.values, mean_entropy, read.trunk_states
        )

    @torch.no_grad()
    def likelihoods(self, rollout: Rollout) -> Likelihoods:
        """Each row read by policy, critic and reference, rows of similar length side by side."""
        shape = rollout.response_mask.shape
        read = Likelihoods(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
        lengths = rollout.prompts.attention_mask.sum(dim=1) + rollout.lengths
        for rows in cut_by_length(lengths, self.micro_batch_size, self.topology.packs):
            sequences = join(
                rollout.prompts.input_ids[rows].to(self.device),
                rollout.prompts.attention_mask[rows].to(self.device),
                rollout.response_ids[rows].to(self.device),
                rollout.response_mask[rows].to(self.device),
                rollout.min_new_tokens[rows].to(self.device),
            )
            sequences.trunk_states = self.topology.trunk_states(sequences)
            evaluation = self.topology.evaluate(sequences, with_entropy=True)
            read.ref_logprobs[rows] = self.reference.logprobs(sequences).cpu()
            read.logprobs[rows], read.entropy[rows] = evaluation.logprobs.cpu(), evaluation.entropy.cpu()
            if evaluation.values is not None:
                read.values = read.values if read.values is not None else torch.zeros(shape)
                read.values[rows] = evaluation.values.cpu()
            if (states := sequences.trunk_states) is not None:
                if read.trunk_states is None:
                    # They stay where they are needed, in the precision they were made in.
                    read.trunk_states = states.new_zeros(len(rollout), int(lengths.max()), states.shape[2])
                read.trunk_states[rows.to(self.device), : states.shape[1]] = states
        return read
