"""The update: epochs over minibatches, each minibatch one optimizer step, cut into microbatches for memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from chatrlhf.functional.importance import importance_ratios, importance_weights
from chatrlhf.functional.kl import k3
from chatrlhf.functional.losses import policy_clipped, policy_loss, token_weights, value_loss
from chatrlhf.models.actor_critic import ActorCritic, DetachPoint, Evaluation
from chatrlhf.models.loading.model_info import fingerprint
from chatrlhf.models.sequences import Sequences
from chatrlhf.rl.data_parallel import update_rows
from chatrlhf.rl.experience import Algorithm
from chatrlhf.rl.gradients import Gradients
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.rl.microbatches import cut_by_length
from chatrlhf.runtime.collectives import sum_over_ranks
from chatrlhf.runtime.cpu_parallel import run_in_parallel
from chatrlhf.runtime.malloc import trim_malloc
from chatrlhf.runtime.optimizer import Hyperparameters
from chatrlhf.types import Experience

WEIGHTS = "model.safetensors"


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


@dataclass
class Updater:
    """Improves a topology by one rollout's experience."""

    actor_critic: ActorCritic
    optimizer: torch.optim.Optimizer
    scheduler: Any
    algorithm: Algorithm
    settings: UpdateSettings
    device: torch.device
    masters: MasterWeights | None = None  # None: the models' own weights are what is trained

    def update(self, experience: Experience, kl_coef: float, generator: torch.Generator) -> dict[str, float]:
        """Run all epochs.

        Args:
            experience: B rows, a multiple of the batch size.
            kl_coef: beta, for algorithms that carry the KL term in the loss.
            generator: shuffles the rows, so that a resumed run sees the same minibatches.

        Returns:
            Means over all minibatches, by metric name; ``ppo/first_ratio_error`` is mean |ratio - 1| of the first
            minibatch, whose policy is still the one that sampled: rounding, and nothing else.
        """
        if self.device.type == "cpu":
            trim_malloc()  # the rollout's: this is where a run needs the most
        experience = experience.to(self.device)
        steps: list[dict[str, float]] = []
        for _ in range(self.settings.epochs):
            order = torch.randperm(len(experience), generator=generator)
            for index in order.split(self.settings.batch_size):
                steps.append(self.step(experience.select(index.to(self.device)), kl_coef))
        self._zero_grad()
        means = {name: sum(stats[name] for stats in steps) / len(steps) for name in steps[0]}
        return means | {"ppo/first_ratio_error": steps[0]["ppo/ratio_error"]}

    def step(self, minibatch: Experience, kl_coef: float) -> dict[str, float]:
        """One optimizer step on a minibatch; its statistics are left on the device until the step is done."""
        sums = sum_over_ranks(self.backward(minibatch, kl_coef))
        sums["ppo/grad_norm"] = self._step()
        # One transfer a step, not one a number.
        return dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))

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
        self._zero_grad()
        lengths = (minibatch.prompt_mask.sum(dim=1) + minibatch.response_mask.sum(dim=1)).cpu()
        own = update_rows(lengths, minibatch.trunk_rows)
        pieces = (
            cut_by_length(lengths[own], self.settings.micro_batch_size, self.actor_critic.supports_packing)
            if len(own)
            else []
        )
        backwards = self._num_microbatches(len(pieces))
        for number in range(backwards):
            if number < len(pieces):
                rows = own[pieces[number]].to(self.device)
                micro, share, token_share = minibatch.select(rows), weights[rows], token_mean[rows]
            else:
                # Without a row left this rank reads the shortest with weight 0, so that it has all that is added up.
                rows = lengths.argmin()[None].to(self.device)
                micro, share = _without_states(minibatch.select(rows)), 0 * weights[rows]
                token_share = 0 * token_mean[rows]
            losses, detach_point, stats = self._losses(micro, share, token_share, kl_coef)
            self._backward_microbatch(losses, detach_point, last=number == backwards - 1)
            for name, value in stats.items():
                sums[name] = sums[name] + value if name in sums else value
        self._reduce_gradients()
        return sums

    def _zero_grad(self) -> None:
        self.gradients.forget()

    def _num_microbatches(self, pieces: int) -> int:
        """How many backwards this rank makes of so many pieces: each has one at least."""
        return max(pieces, 1)

    def _evaluate(self, sequences: Sequences) -> Evaluation:
        return self.actor_critic.evaluate(sequences, with_entropy=self.settings.entropy_coef > 0, detach_point=True)

    def _backward_microbatch(self, losses: list[Tensor], detach_point: DetachPoint | None, last: bool) -> None:
        """The backward of a microbatch, added to those before it; ``last`` of the minibatch or not."""
        if detach_point is not None:
            losses[0].backward()
            run_in_parallel(detach_point.backward, losses[1].backward, self.device)
        elif self.actor_critic.critic_is_apart:
            run_in_parallel(losses[0].backward, losses[1].backward, self.device)
        else:
            sum(losses).backward()
        self.gradients.collect()

    def _reduce_gradients(self) -> None:
        self.gradients.finish()

    def _losses(
        self, micro: Experience, weights: Tensor, token_mean: Tensor, kl_coef: float
    ) -> tuple[list[Tensor], DetachPoint | None, dict[str, Tensor]]:
        """This microbatch's share of the policy's loss, of the critic's where there is one, and of the statistics."""
        settings = self.settings
        sequences = self.actor_critic.sequences(
            micro.prompt_ids,
            micro.prompt_mask,
            micro.response_ids,
            micro.response_mask,
            micro.min_new_tokens,
            micro.own_trunk_states,
        )
        evaluation = self._evaluate(sequences)
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

    def _step(self) -> Tensor:
        """Clip, step and publish; returns the norm of the policy's gradient before, 0-d."""
        norm = self.gradients.clip(self.settings.max_grad_norm)[0]
        self.optimizer.step()
        self.scheduler.step()
        if self.masters is not None:
            self.masters.publish()
        return norm

    def gathered_weights(self) -> AbstractContextManager[None]:
        """Inside, rollouts can be sampled and scored: the models of engine and scorer have the newest weights."""
        return nullcontext()

    def close(self) -> None:
        """Let go of what is held besides the models' weights."""

    @property
    def fingerprint(self) -> str:
        """Equal for updaters that can exchange weights."""
        return fingerprint(self.actor_critic)

    def save_weights(self, folder: Path) -> None:
        """Write what is trained, by one process; frozen weights are made anew from where the run started."""
        with self.full_precision():
            save_trained(self.actor_critic, folder / WEIGHTS)

    def load_weights(self, folder: Path) -> None:
        """Read what `save_weights` wrote."""
        with self.full_precision():
            load_trained(self.actor_critic, folder / WEIGHTS)

    def save_shards(self, folder: Path) -> None:
        """Write what this process alone holds; all processes do."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds besides weights and shards."""
        return {"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave, with this run's learning rates, betas, weight decay and schedule."""
        own = Hyperparameters(self.optimizer, self.scheduler)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        own.put_back()

    def full_precision(self) -> AbstractContextManager[None]:
        """Inside, the topology holds float32 weights: what is saved, and what is loaded into."""
        return self.masters.fp32_weights() if self.masters is not None else nullcontext()

    @cached_property
    def gradients(self) -> Gradients:
        """Of the minibatch that is being learned from."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        parameters = [each for group in groups for each in group]
        return Gradients(groups, self.masters.working_params(parameters) if self.masters is not None else parameters)


def save_trained(actor_critic: nn.Module, path: Path) -> None:
    """Write what is trained. Frozen weights are made anew from where the run started, as the reference is."""
    save_file({name: weight.detach().contiguous() for name, weight in _trained(actor_critic).items()}, path)


@torch.no_grad()
def load_trained(actor_critic: nn.Module, path: Path) -> None:
    """Read what `save_trained` wrote of a topology with the same fingerprint."""
    saved = load_file(path)
    for name, weight in _trained(actor_critic).items():
        weight.copy_(saved[name])


def _trained(actor_critic: nn.Module) -> dict[str, Tensor]:
    return {name: weight for name, weight in actor_critic.named_parameters() if weight.requires_grad}


def _without_states(micro: Experience) -> Experience:
    """Rows whose states are with another rank, with states that say nothing in their place."""
    if micro.trunk_states is None:
        return micro
    width = micro.prompt_mask.shape[1] + micro.response_mask.shape[1]
    states = micro.trunk_states.new_zeros(len(micro), width, micro.trunk_states.shape[-1])
    return replace(micro, trunk_states=states, trunk_rows=None)
