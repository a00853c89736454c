"""The update: epochs over minibatches, each minibatch one optimizer step, cut into microbatches for memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from chatrlhf.errors import DivergedError
from chatrlhf.functional.importance import importance_ratios, importance_weights
from chatrlhf.functional.kl import k3
from chatrlhf.functional.losses import policy_clipped, policy_loss, token_weights, value_loss
from chatrlhf.models.actor_critic import ActorCritic, DetachPoint
from chatrlhf.models.sequences import Sequences
from chatrlhf.rl.data_parallel import update_rows
from chatrlhf.rl.experience import Algorithm
from chatrlhf.rl.gradient_backend import GradientBackend
from chatrlhf.rl.microbatches import cut_by_length
from chatrlhf.runtime.collectives import sum_over_ranks
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.finite import first_module_not_finite, first_not_finite
from chatrlhf.runtime.malloc import trim_malloc
from chatrlhf.runtime.watchdog import beat
from chatrlhf.types import Experience


@dataclass(frozen=True)
class UpdateSettings:
    """The knobs of the objective and of how it is descended."""

    epochs: int
    batch_size: int  # sequences per optimizer step
    micro_batch_size: int  # longest sequences per backward; of shorter ones as many as fill the same room
    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 1.0
    entropy_coef: float = 0.0
    max_grad_norm: float | None = 1.0
    # Rollouts of another engine than this package's: each token's policy loss is weighed by how likely it is here.
    foreign_sampler: bool = False
    importance_cap: float | None = 2.0


CRITICS_NORM = "the norm of the critic's gradient"


class StepSkippedError(DivergedError):
    """An optimizer step was left out; the message names what is not finite."""


@dataclass(frozen=True)
class NotTaken:
    """A minibatch that was not learned from, because its losses or gradients were not finite."""

    rows: list[int]  # of the experience
    why: str
    where: str | None  # the weight, input or module that is the first not to be finite


@dataclass
class Updater:
    """Improves an actor-critic by one rollout's experience."""

    actor_critic: ActorCritic
    algorithm: Algorithm
    settings: UpdateSettings
    device: torch.device
    backend: GradientBackend
    not_taken: list[NotTaken] = field(default_factory=list)  # of the last update

    def update(self, experience: Experience, kl_coef: float, generator: torch.Generator) -> dict[str, float]:
        """Run all epochs.

        A minibatch with a loss or a gradient that is not finite changes nothing: neither weights nor moments nor the
        schedule. It is put into `not_taken`.

        Args:
            experience: B rows, a multiple of the batch size.
            kl_coef: beta, for algorithms that carry the KL term in the loss.
            generator: shuffles the rows, so that a resumed run sees the same minibatches.

        Returns:
            Means over the minibatches that were learned from, by metric name, none where there is no such minibatch;
            ``ppo/first_ratio_error`` is mean |ratio - 1| of the first, whose policy is still the one that sampled:
            rounding, and nothing else.

        Raises:
            DivergedError: of a backend that steps before its gradients are known.
        """
        if self.device.type == "cpu":
            trim_malloc()  # the rollout's: this is where a run needs the most
        experience = experience.to(self.device)
        steps: list[dict[str, float]] = []
        self.not_taken = []
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(experience), generator=generator)
            for index in order.split(self.settings.batch_size):
                minibatch = experience.select(index.to(self.device))
                try:
                    steps.append(self.step(minibatch, kl_coef))
                except StepSkippedError as skipped:
                    where = self._where(minibatch, kl_coef)
                    self.not_taken.append(NotTaken(index.tolist(), str(skipped), where))
        self.backend.zero_grad()
        if not steps:
            return {}
        means = {name: sum(stats[name] for stats in steps) / len(steps) for name in steps[0]}
        return means | {"ppo/first_ratio_error": steps[0]["ppo/ratio_error"]}

    def step(self, minibatch: Experience, kl_coef: float) -> dict[str, float]:
        """One optimizer step on a minibatch; returns its statistics.

        Raises:
            StepSkippedError: one of them or a gradient is not finite; nothing has changed.
            DivergedError: the same, of a backend that steps before its gradients are known.
        """
        reached("rl.optimizer_step")
        beat("RL: update, a minibatch")
        sums = sum_over_ranks(self.backward(minibatch, kl_coef))
        reached("rl.gradients", self.actor_critic)
        norms = self.backend.clip(self.settings.max_grad_norm)
        sums |= zip(("ppo/grad_norm", CRITICS_NORM)[: len(norms)], norms, strict=True)
        # One transfer a step, not one a number.
        read = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        wrong = ", ".join(f"{name} {value}" for name, value in read.items() if not math.isfinite(value))
        read.pop(CRITICS_NORM, None)
        if wrong and norms:
            self.backend.skip()
            raise StepSkippedError(wrong)
        if wrong:
            raise DivergedError(f"{wrong}; nothing of this step is saved")
        if late := self.backend.step():
            # DeepSpeed leaves out a step whose fp16 gradients overflow, and lowers its loss scale.
            read["ppo/grad_norm"] = float(late[0])
        return read

    def _where(self, minibatch: Experience, kl_coef: float) -> str | None:
        """What in a minibatch, or in the models' forward on it, is the first not to be finite."""
        if (weight := first_not_finite(self.actor_critic.named_parameters())) is not None:
            return weight
        inputs = ((each.name, getattr(minibatch, each.name)) for each in fields(minibatch))
        name = first_not_finite((name, value) for name, value in inputs if isinstance(value, Tensor))
        if name is not None:
            return f"the rollout's {name}"
        if self.backend.shards:
            return None
        weights = token_weights(minibatch.response_mask, self.algorithm.aggregation)

        def forward() -> None:
            for row in torch.arange(len(minibatch), device=self.device).split(max(self.settings.micro_batch_size, 1)):
                micro = minibatch.select(row)
                self.losses(self._sequences(micro), micro, weights[row], weights[row], kl_coef)

        return first_module_not_finite(self.actor_critic, forward)

    def backward(self, minibatch: Experience, kl_coef: float) -> dict[str, Tensor]:
        """Leave the minibatch's gradient, of all ranks' rows, with what the optimizer improves.

        The weights are made for the whole minibatch, so the gradient does not depend on the microbatches, which
        are cut so that little is computed on padding, nor on the number of ranks. Ranks add theirs up once, whatever
        each one's number of backwards was; from then on all do the same.

        Returns:
            Sums over this rank's rows that, over all ranks, are means over the minibatch.
        """
        weights = token_weights(minibatch.response_mask, self.algorithm.aggregation)
        # Value loss and statistics are plain means over tokens, whatever the policy loss is.
        token_mean = token_weights(minibatch.response_mask, "token_mean")
        sums: dict[str, Tensor] = {}
        self.backend.zero_grad()
        lengths = (minibatch.prompt_mask.sum(dim=1) + minibatch.response_mask.sum(dim=1)).cpu()
        own = update_rows(lengths, minibatch.trunk_rows)
        pieces = (
            cut_by_length(lengths[own], self.settings.micro_batch_size, self.actor_critic.supports_packing)
            if len(own)
            else []
        )
        backwards = self.backend.num_microbatches(len(pieces))
        for number in range(backwards):
            if number < len(pieces):
                rows = own[pieces[number]].to(self.device)
                micro, share, token_share = minibatch.select(rows), weights[rows], token_mean[rows]
            else:
                # Without a row left this rank reads the shortest with weight 0, so that it has all that is added up.
                rows = lengths.argmin()[None].to(self.device)
                micro, share = _without_states(minibatch.select(rows)), 0 * weights[rows]
                token_share = 0 * token_mean[rows]
            losses, detach_point, stats = self.losses(self._sequences(micro), micro, share, token_share, kl_coef)
            self.backend.backward(losses, detach_point, last=number == backwards - 1)
            for name, value in stats.items():
                sums[name] = sums[name] + value if name in sums else value
        self.backend.reduce()
        return sums

    def losses(
        self, sequences: Sequences, micro: Experience, weights: Tensor, token_mean: Tensor, kl_coef: float
    ) -> tuple[list[Tensor], DetachPoint | None, dict[str, Tensor]]:
        """This microbatch's share of the policy's loss, of the critic's where there is one, and of the statistics.

        Args:
            sequences: the microbatch as the actor-critic reads it.
            weights, token_mean: [B, R], of each token in the policy's loss, and in plain means over the minibatch.

        Returns:
            One or two 0-d losses; where the trunk's backward is to begin, if it is to wait; 0-d sums by metric name.
        """
        settings = self.settings
        evaluation = self.backend.evaluate(sequences, with_entropy=settings.entropy_coef > 0)
        logprobs = evaluation.logprobs
        per_token = policy_loss(logprobs, micro.old_logprobs, micro.advantages, settings.cliprange)
        if settings.foreign_sampler:
            per_token = per_token * importance_weights(
                micro.old_logprobs, micro.sampling_logprobs, settings.importance_cap
            )
        if self.algorithm.kl_in == "loss":
            per_token = per_token + kl_coef * k3(logprobs, micro.ref_logprobs)
        policy = (weights * per_token).sum()
        losses = [policy]
        stats = {"loss/policy": policy.detach()}
        if evaluation.values is not None:
            assert micro.old_values is not None and micro.returns is not None
            per_value = value_loss(evaluation.values, micro.old_values, micro.returns, settings.cliprange_value)
            value = (token_mean * per_value).sum()
            losses.append(settings.vf_coef * value)
            stats["loss/value"] = value.detach()
        if evaluation.entropy is not None:
            # Minus: the bonus rewards entropy.
            losses[0] = policy - settings.entropy_coef * (weights * evaluation.entropy).sum()
        with torch.no_grad():
            clipped = policy_clipped(logprobs, micro.old_logprobs, micro.advantages, settings.cliprange)
            stats["ppo/clipfrac"] = (token_mean * clipped).sum()
            # KL(old || new) with samples of the old: the k3 estimate with the roles turned round.
            stats["ppo/approx_kl"] = (token_mean * k3(micro.old_logprobs, logprobs)).sum()
            stats["ppo/ratio_error"] = (token_mean * (torch.exp(logprobs - micro.old_logprobs) - 1).abs()).sum()
            if settings.foreign_sampler and settings.importance_cap is not None:
                ratios = importance_ratios(micro.old_logprobs, micro.sampling_logprobs)
                stats["sampling/truncated"] = (token_mean * (ratios > settings.importance_cap)).sum()
        return losses, evaluation.detach_point, stats

    def _sequences(self, micro: Experience) -> Sequences:
        return self.actor_critic.sequences(
            micro.prompt_ids,
            micro.prompt_mask,
            micro.response_ids,
            micro.response_mask,
            micro.min_new_tokens,
            micro.own_trunk_states,
        )


def _without_states(micro: Experience) -> Experience:
    """Rows whose states are with another rank, with states that say nothing in their place."""
    if micro.trunk_states is None:
        return micro
    width = micro.prompt_mask.shape[1] + micro.response_mask.shape[1]
    states = micro.trunk_states.new_zeros(len(micro), width, micro.trunk_states.shape[-1])
    return replace(micro, trunk_states=states, trunk_rows=None)
