"""Where PPO's value function comes from, and the actor-critic that puts it beside the policy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import CriticConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.loading.backbone import backbone_of, is_encoder_decoder
from chatrlhf.models.loading.lora import backbone_with_adapters, has_adapters, where
from chatrlhf.models.loading.pretrained import load_backbone
from chatrlhf.models.loading.sequence_classifier import is_classifier, refuse_labels, require_head
from chatrlhf.models.loading.tokenizer import load_tokenizer, same_tokenizer
from chatrlhf.models.reward_model import RewardScorer, is_reward_model, load_reward_model
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import is_causal
from chatrlhf.models.trained_heads import classifier_scorer
from chatrlhf.models.weight_sharing import copy_sharing_frozen, merged_copy, with_lora

ALL_BLOCKS = -1  # of `trainer_config.num_layers_unfrozen`


def make_actor_critic(
    policy: nn.Module,
    tokenizer: Any,
    reward: RewardScorer | None,
    config: CriticConfig,
    distribution: Any,
    needs_critic: bool,
    reward_name: str | None = None,
    unfrozen: int = ALL_BLOCKS,
    adapters: PeftConfig | None = None,
    base: str = "",
) -> tuple[ActorCritic, str]:
    """The actor-critic that the configuration asks for, and one line that says where the critic starts from.

    A critic starts from the reward model only where that is causal, of the policy's kind and has its
    tokenizer: then it already knows what a good prefix looks like. Otherwise it starts from a copy of the
    policy under a head that predicts 0.

    Args:
        reward: the trained reward model, None where a function gives the reward.
        reward_name: `reward_config.model`. A critic of that name means the trained reward model, as in ChatLLaMA.
        unfrozen: `trainer_config.num_layers_unfrozen`, blocks of the policy that are trained.
        adapters: trained instead of a critic's own weights, which then are those of what it starts from.
        base: where the policy's weights are, or those that its adapters are built on.

    Raises:
        ConfigError: a critic that is named cannot be one, or the policy's blocks cannot be parted like that.
    """
    if unfrozen != ALL_BLOCKS:
        freeze_trunk(policy, unfrozen)
    critic, line = _critic(policy, tokenizer, reward, config, needs_critic, reward_name, adapters, base)
    if unfrozen != ALL_BLOCKS:
        line += f"; all but the top {unfrozen} blocks are frozen and shared"
    return assemble(policy, critic, distribution, unfrozen), line


def assemble(
    policy: nn.Module, critic: tuple[nn.Module | None, ScalarHead] | None, distribution: Any, unfrozen: int = ALL_BLOCKS
) -> ActorCritic:
    """The policy beside its critic: a backbone, None where that is the policy's, and a head; None without critic."""
    if critic is None:
        made = PolicyOnly(policy, distribution)
    elif critic[0] is None:
        made = SharedTrunk(policy, critic[1], distribution)
    else:
        made = SeparateCritic(policy, *critic, distribution)
    return made if unfrozen == ALL_BLOCKS else FrozenTrunk(made, unfrozen)


def _critic(
    policy: nn.Module,
    tokenizer: Any,
    reward: RewardScorer | None,
    config: CriticConfig,
    needs_critic: bool,
    reward_name: str | None,
    adapters: PeftConfig | None,
    base: str,
) -> tuple[tuple[nn.Module | None, ScalarHead] | None, str]:
    """The critic's backbone, None where that is the policy's, and its head; and where it starts from."""
    if not needs_critic:
        return None, "no critic: this algorithm compares samples of one prompt"
    device = next(policy.parameters()).device
    mlp = config.model_head_hidden_size
    hidden = state_size(policy)
    if config.model == "shared":
        head = ScalarHead(hidden, mlp).zero_().to(device)
        return (None, head), "critic: a value head on the policy's trunk, starting at 0"
    named = config.model is not None and not (config.model == reward_name and reward is not None)
    start = reward
    if named:
        start = _named_scorer(config.model, device, adapters is not None)
    reason = None if named and start is None else _why_not_from(start, policy, tokenizer)
    if reason is not None and config.model is not None:
        raise ConfigError(f"critic_config.model: {config.model!r} cannot be the critic: {reason}")
    line = config.model if named else "starts from the reward model"
    if start is not None and reason is None:
        backbone, base = start.model.backbone, start.place or base
        head = copy.deepcopy(start.model.head).requires_grad_(True).fold_(start.model.scale, start.model.shift)
    elif named:
        backbone, base = _named_backbone(config.model, policy, tokenizer).to(device), where(config.model)
        head = ScalarHead(state_size(backbone), mlp).zero_().to(device)
    else:
        backbone, line = backbone_with_adapters(policy), f"a copy of the policy under a zero head ({reason})"
        head = ScalarHead(hidden, mlp).zero_().to(device)
    if adapters is not None:
        if named:
            backbone.requires_grad_(False)  # no one else has it: it need not be copied
        critic = with_lora(backbone, adapters, base)
        line += ", trained by adapters"
    elif named and not has_adapters(backbone):
        critic = backbone
    elif backbone is backbone_of(policy) and not has_adapters(policy):
        critic = copy_sharing_frozen(backbone)
    else:
        critic = merged_copy(backbone)
    return (critic, head), f"critic: {line}"


def refuse_critic_head(name: str) -> None:
    """A ConfigError where a classifier's head cannot be a value head."""
    key = "critic_config.model"
    if is_classifier(name, key):
        require_head(name, key)
        refuse_labels(name, key, "name a model without a head of its own, or set it to null")


def _named_scorer(name: str, device: Any, keep_adapters: bool) -> RewardScorer | None:
    """What is named, where it brings a head that values can start from."""
    if is_reward_model(name):
        return load_reward_model(name, device, keep_adapters=keep_adapters)
    if not is_classifier(name, "critic_config.model"):
        return None
    scorer = classifier_scorer(name, "critic_config.model", keep_adapters)
    scorer.model.to(device)
    return scorer


def _named_backbone(name: str, policy: nn.Module, tokenizer: Any) -> nn.Module:
    """A model that is no reward model, as the policy's critic."""
    backbone = load_backbone(name, "critic_config.model")
    refuse_other_build(backbone.config, policy.config, name)
    if not is_encoder_decoder(policy.config) and not is_causal(backbone):
        raise ConfigError(f"critic_config.model: {name!r} is not causal, so it has no value before a token")
    if not same_tokenizer(tokenizer, load_tokenizer(name, "critic_config.model")):
        raise ConfigError(f"critic_config.model: {name!r} has another tokenizer than the actor")
    return backbone


def refuse_other_build(critic: Any, policy: Any, name: str) -> None:
    """A ConfigError where, by their configurations, one of critic and policy is an encoder–decoder and one is not."""
    paired = is_encoder_decoder(policy)
    if paired != is_encoder_decoder(critic):
        kinds = ("is no encoder-decoder", "is one") if paired else ("is an encoder-decoder", "is none")
        raise ConfigError(
            f"critic_config.model: {name!r} {kinds[0]} and the actor {kinds[1]}; set it to null, to shared, or to a "
            "model of the actor's build"
        )


def _why_not_from(reward: RewardScorer | None, policy: nn.Module, tokenizer: Any) -> str | None:
    if reward is None:
        return "the reward is not a model"
    if is_encoder_decoder(policy.config):
        if reward.model.pooling != "reply":
            return "the reward model does not read a prompt and its reply apart"
    elif reward.model.pooling != "last":
        return "the reward model is not causal"
    if reward.model.config.model_type != policy.config.model_type:
        return f"the reward model is a {reward.model.config.model_type}, the policy a {policy.config.model_type}"
    if not same_tokenizer(tokenizer, reward.tokenizer):
        return "the reward model has another tokenizer"
    return None
