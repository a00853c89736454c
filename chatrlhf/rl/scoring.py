"""A rollout with everything the estimators need: scores, log-probabilities, reference, values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from chatrlhf.errors import RewardError
from chatrlhf.functional.masked import masked_mean
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.reference import Reference
from chatrlhf.rl.data_parallel import local_rows, merge_shards
from chatrlhf.rl.microbatches import cut_by_length
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import RewardSource
from chatrlhf.runtime.collectives import gather_results
from chatrlhf.runtime.device import release_cached
from chatrlhf.types import Rollout, ScoredRollout


@dataclass
class Likelihoods:
    """What the models make of a rollout; [B, R] float32 on the CPU, 0 where masked."""

    logprobs: Tensor  # of the policy
    ref_logprobs: Tensor
    entropy: Tensor
    values: Tensor | None = None  # None without a critic
    trunk_states: Tensor | None = None  # as in Experience, on the device
    trunk_rows: Tensor | None = None


@dataclass
class Scorer:
    """Scores a rollout once, before the update touches the policy.

    ``old_logprobs`` are recomputed by the same forward that the update uses, so the first ratio is 1 up to
    rounding; the sampler's own stay on the rollout.
    """

    actor_critic: ActorCritic
    reference: Reference
    reward: RewardSource
    scaling: RewardScaling
    device: torch.device
    micro_batch_size: int = 64

    @torch.no_grad()
    def score(self, rollout: Rollout, rows: Tensor | None = None) -> ScoredRollout:
        """Scores [B] and per-token quantities [B, R], on the CPU; of the whole batch, as `read` gives it.

        Raises:
            RewardError: as `read`; or the scores are too large to be learned from.
        """
        rollout, raw_scores, read = self.read(rollout, rows)
        scores = self.scaling(raw_scores, rollout.finished)
        if not scores.square().sum().isfinite():
            raise RewardError(
                f"the scores reach {float(scores.abs().max()):.3g}, and their squares, which value loss and "
                "normalization need, are beyond float32; set trainer_config.cliprange_reward or scale_reward"
            )
        mean_entropy = float(masked_mean(read.entropy, rollout.response_mask))
        return ScoredRollout(
            rollout,
            scores,
            raw_scores,
            read.logprobs,
            read.ref_logprobs,
            read.values,
            mean_entropy,
            read.trunk_states,
            read.trunk_rows,
        )

    @torch.no_grad()
    def read(self, rollout: Rollout, rows: Tensor | None = None) -> tuple[Rollout, Tensor, Likelihoods]:
        """What reward and models make of a rollout, ``micro_batch_size`` longest rows at once.

        Args:
            rollout: of the rows that this rank has sampled.
            rows: [N] int64, their places in the batch; None in one process, where they are all of it.

        Returns:
            Rollout, raw scores [B] and likelihoods of all ranks' rows, in the order of the batch, on every rank. Only a
            frozen trunk's states stay with the rank that made them.

        Raises:
            RewardError: on every rank, where one rank's reward gave something other than a finite number a response.
        """
        own = self.likelihoods(rollout)
        states, own.trunk_states = own.trunk_states, None
        shares = gather_results(lambda: (rollout, self.reward(rollout), own, rows))
        rollouts, raw_scores, likelihoods, places = (list(each) for each in zip(*shares, strict=True))
        read = merge_shards(likelihoods, places)
        read.trunk_states = states
        if states is not None and len(shares) > 1:
            read.trunk_rows = local_rows(places)
        return merge_shards(rollouts, places), merge_shards(raw_scores, places), read

    def likelihoods(self, rollout: Rollout) -> Likelihoods:
        """Each row read by policy, critic and reference, rows of similar length side by side.

        Where the device's memory is too small for so many, half as many are read from there on.
        """
        while (read := self._likelihoods_if_they_fit(rollout)) is None:
            release_cached(self.device)
            self.micro_batch_size //= 2
        return read

    def _likelihoods_if_they_fit(self, rollout: Rollout) -> Likelihoods | None:
        try:
            return self._likelihoods(rollout)
        except torch.OutOfMemoryError:
            if self.micro_batch_size <= 1:
                raise
        return None  # outside of the handler: the error's traceback holds on to what was computed

    @torch.no_grad()
    def _likelihoods(self, rollout: Rollout) -> Likelihoods:
        shape = rollout.response_mask.shape
        read = Likelihoods(torch.zeros(shape), torch.zeros(shape), torch.zeros(shape))
        lengths = rollout.prompts.attention_mask.sum(dim=1) + rollout.lengths
        for rows in cut_by_length(lengths, self.micro_batch_size, self.actor_critic.supports_packing):
            sequences = self.actor_critic.sequences(
                rollout.prompts.input_ids[rows].to(self.device),
                rollout.prompts.attention_mask[rows].to(self.device),
                rollout.response_ids[rows].to(self.device),
                rollout.response_mask[rows].to(self.device),
                rollout.min_new_tokens[rows].to(self.device),
            )
            sequences.trunk_states = self.actor_critic.trunk_states(sequences)
            evaluation = self.actor_critic.evaluate(sequences, with_entropy=True)
            assert evaluation.entropy is not None
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
