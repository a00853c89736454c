"""The memory of one device in each phase of the RL stage: rollout, scoring, update."""

from __future__ import annotations

import warnings

import torch

from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.traits import traits_of
from chatrlhf.tools.plan.fake_run import MemoryTracker
from chatrlhf.tools.plan.meta_models import Models
from chatrlhf.tools.plan.meta_rl_models import actor_critic_of, critic_of, made_ready, preparation, reward_of
from chatrlhf.tools.plan.rl_memory import (
    CRITIC,
    MASTERS,
    POLICY,
    REFERENCE,
    REWARD,
    RolloutBatch,
    dealt_out,
    rollout,
    scoring,
)
from chatrlhf.tools.plan.rl_update_memory import update
from chatrlhf.tools.plan.sft_reward_memory import StagePlan, dimensions, numbers
from chatrlhf.tools.plan.zero_memory import Sharding


def rl_stage(models: Models, batch: RolloutBatch, sharding: Sharding, has_function: bool) -> StagePlan:
    """PPO, RLOO or GRPO.

    Args:
        has_function: a function gives the reward, and there is no reward model.
    """
    config, fake_device = models.config, models.fake_device
    trainer = config.trainer_config
    policy = models.policy()
    reward = None if has_function else reward_of(models, policy)
    critic = critic_of(models, policy, reward)
    with fake_device.tracking(MemoryTracker()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch itself, where it copies
        actor_critic = actor_critic_of(models, policy, critic)
        reference = actor_critic.reference()
        for each in (*actor_critic.backbones(), reference.model):
            traits_of(backbone_of(each)).packed_is_padded = False  # rows of one length go side by side
        frozen = [reference.model] + ([reward.backbone] if reward else [])
        # Where weights are sharded, models are in the CPU's memory by then.
        prepared = [] if sharding.stage == 3 else preparation(actor_critic, frozen, models)
    masters = made_ready(actor_critic, frozen, models)
    named = [(POLICY, actor_critic.policy), (CRITIC, actor_critic), (REFERENCE, reference.model)]
    named += [(REWARD, reward)] if reward else []
    resident = [(name, list(module.parameters())) for name, module in named]
    resident += [(MASTERS, list(masters))] if masters else []
    groups = actor_critic.parameter_groups(trainer.actor_lr, trainer.critic_lr)
    optimizer = torch.optim.AdamW(masters.groups(groups) if masters is not None else groups)
    phases = [
        *prepared,
        rollout(actor_critic, resident, batch, fake_device),
        scoring(actor_critic, reference, reward, resident, batch, fake_device),
        update(actor_critic, optimizer, masters, resident, batch, fake_device, config),
    ]
    trained = sum(each.numel() for group in optimizer.param_groups for each in group["params"])
    beside = {REWARD: dimensions(reward)} if reward else {}
    if actor_critic.critic_is_apart:
        beside[CRITIC] = dimensions(actor_critic.value_function()[0])
    return StagePlan(
        parameters=numbers(actor_critic.policy)[0],
        trained=trained,
        phases=[dealt_out(each, sharding, trained) for each in phases],
        dimensions=dimensions(actor_critic.policy),
        beside=beside,
        in_bf16=masters is not None,
    )
