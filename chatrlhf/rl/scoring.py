"""A rollout with everything the estimators need: scores, log-probabilities, reference, values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatrlhf.functional.masked import masked_mean
from chatrlhf.models.sequences import join
from chatrlhf.models.topology import PolicyOnly, Reference
from chatrlhf.rl.microbatches import cut_by_length
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import RewardSource
from chatrlhf.types import Rollout, ScoredRollout


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
        old, ref, values, entropy = self.likelihoods(rollout)
        mean_entropy = float(masked_mean(entropy, rollout.response_mask))
        return ScoredRollout(rollout, scores, raw_scores, old, ref, values, mean_entropy)

    @torch.no_grad()
    def likelihoods(self, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Log-probabilities of policy and reference, values (None without a critic) and entropies, [B, R] each."""
        shape = rollout.response_mask.shape
        old, ref, values, entropy = (torch.zeros(shape) for _ in range(4))
        has_values = False
        lengths = rollout.prompts.attention_mask.sum(dim=1) + rollout.lengths
        for rows in cut_by_length(lengths, self.micro_batch_size, self.topology.packs):
            sequences = join(
                rollout.prompts.input_ids[rows].to(self.device),
                rollout.prompts.attention_mask[rows].to(self.device),
                rollout.response_ids[rows].to(self.device),
                rollout.response_mask[rows].to(self.device),
                rollout.min_new_tokens[rows].to(self.device),
            )
            evaluation = self.topology.evaluate(sequences, with_entropy=True)
            ref[rows] = self.reference.logprobs(sequences).cpu()
            old[rows], entropy[rows] = evaluation.logprobs.cpu(), evaluation.entropy.cpu()
            if evaluation.values is not None:
                has_values = True
                values[rows] = evaluation.values.cpu()
        return old, ref, values if has_values else None, entropy
