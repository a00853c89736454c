"""What the RL stage holds while it learns: the update's own losses and backwards, on fake tensors."""

from __future__ import annotations

import torch

from chatrlhf.config.schema import Config
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.gradients import Gradients
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.rl.update import Updater
from chatrlhf.stages.build_ppo import update_settings
from chatrlhf.tools.plan.fake_run import ACTIVATIONS, GRADIENTS, FakeDevice, MemoryTracker
from chatrlhf.tools.plan.rl_memory import TRUNK, RolloutBatch, opened, replace_states, sequences_of
from chatrlhf.tools.plan.sft_reward_memory import OPTIMIZER, Phase
from chatrlhf.types import Experience


class TrackedGradients(Gradients):
    """Gradients whose buffers are entered as such."""

    def __init__(self, groups: list, weights: list, tracker: MemoryTracker) -> None:
        super().__init__(groups, weights)
        self.tracker = tracker

    def collect(self) -> None:
        self.tracker.kind = GRADIENTS
        super().collect()
        self.tracker.kind = ACTIVATIONS


def update(
    actor_critic: ActorCritic,
    optimizer: torch.optim.Optimizer,
    masters: MasterWeights | None,
    resident: list,
    batch: RolloutBatch,
    fake_device: FakeDevice,
    config: Config,
) -> Phase:
    """Two backwards, where a minibatch has as many: behind the first there is room for the sums of gradients."""
    tracker, trainer = opened(resident, fake_device), config.trainer_config
    backend = PlainBackend(actor_critic, optimizer, None, torch.device("meta"), masters)
    own = backend.gradients
    backend.gradients = gradients = TrackedGradients(own.groups, own.weights, tracker)
    updater = Updater(
        actor_critic, ALGORITHMS[trainer.algorithm], update_settings(trainer), torch.device("meta"), backend
    )
    sequences = sequences_of(batch.learned, actor_critic, batch, fake_device)
    hooks = [
        each.register_post_accumulate_grad_hook(lambda weight: tracker.rename(weight.grad, GRADIENTS))
        for each in gradients.weights
    ]
    gradients.forget()
    with fake_device.tracking(tracker):
        with torch.no_grad():
            states = actor_critic.trunk_states(sequences)
            sequences = replace_states(sequences, states)
            if states is not None:
                kept = states.new_zeros(batch.rollouts, *states.shape[1:])
                tracker.rename(kept, TRUNK)
        micro = _experience(batch, actor_critic)
        # A second minibatch finds the optimizer's states in between what the first has left.
        states = []
        for _ in range(1 if tracker.heap is None else 2):
            for number in range(min(batch.backwards, 2)):
                losses, detach_point, _ = updater.losses(
                    sequences, micro, micro.advantages, micro.advantages, trainer.init_kl_coef
                )
                backend.backward(losses, detach_point, last=number > 0)
                del losses, detach_point
            if tracker.heap is not None:
                tracker.kind = OPTIMIZER
                states = states or [torch.zeros_like(each) for each in gradients.parameters for _ in range(2)]
                tracker.kind = ACTIVATIONS
            gradients.forget()
        del states
    for each in hooks:
        each.remove()
    gradients.forget()
    return Phase("RL update", tracker.peak)


def _experience(batch: RolloutBatch, actor_critic: ActorCritic) -> Experience:
    """A microbatch's numbers, all of them 0."""
    prompts = torch.zeros(batch.learned, batch.prompt, dtype=torch.long)
    ids = torch.zeros(batch.learned, batch.response, dtype=torch.long)
    floats, valued = ids.float(), actor_critic.value_function() is not None
    return Experience(
        prompt_ids=prompts,
        prompt_mask=prompts == 0,
        response_ids=ids,
        response_mask=ids == 0,
        min_new_tokens=ids[:, 0],
        old_logprobs=floats,
        ref_logprobs=floats,
        sampling_logprobs=floats,
        advantages=floats,
        returns=floats if valued else None,
        old_values=floats if valued else None,
    )
