"""The models of the RL stage on fake tensors, put together as `stages/rl.py` and `make_actor_critic` do."""

from __future__ import annotations

import torch
from torch import nn

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.model import QuantizationKeys
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.critic_init import ALL_BLOCKS, assemble
from chatrlhf.models.frozen_trunk import freeze_trunk
from chatrlhf.models.kernels import use_kernels
from chatrlhf.models.kernels.activation_checkpointing import recompute_activations
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.loading.lora import has_adapters
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.weight_sharing import copy_sharing_frozen
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.master_weights import MasterWeights, prepare_models
from chatrlhf.tools.plan.meta_models import Models, pooling_of
from chatrlhf.tools.plan.rl_memory import PREPARATION
from chatrlhf.tools.plan.sft_reward_memory import Phase
from chatrlhf.tools.plan.small_twins import small_twins_match


def actor_critic_of(
    models: Models, policy: nn.Module, critic: tuple[nn.Module | None, ScalarHead] | None
) -> ActorCritic:
    """What `make_actor_critic` gives, without tokenizers.

    Args:
        critic: as `critic_of` gives it.
    """
    config, trainer = models.config, models.config.trainer_config
    distribution = SamplingDistribution(trainer.gen_kwargs.temperature or config.actor_config.temperature or 1.0, (0,))
    if trainer.num_layers_unfrozen != ALL_BLOCKS:
        freeze_trunk(policy, trainer.num_layers_unfrozen)
    if critic is not None and critic[0] is None and config.critic_config.model != "shared":
        critic = copy_sharing_frozen(backbone_of(policy)), critic[1]
    return assemble(policy, critic, distribution, trainer.num_layers_unfrozen)


def reward_of(models: Models, policy: nn.Module) -> RewardModel:
    """The trained reward model; by adapters on the policy's weights where it was made of the same ones."""
    config, reward = models.config, models.config.reward_config
    same = reward.model in ("actor", config.actor_config.model)
    bits = [(each.load_in_4bit, each.load_in_8bit) for each in (reward, config.actor_config)]
    if not (same and reward.peft_enable and config.actor_config.peft_enable and bits[0] == bits[1]):
        return models.reward_model().requires_grad_(False).eval()
    adapters = load_peft_config(config, "reward_config")
    backbone = models.on_base(backbone_of(policy), adapters, reward)
    head = models.head(backbone, reward.model_head_hidden_size)
    return RewardModel(backbone, head, pooling_of(backbone.config)).requires_grad_(False).eval()


def critic_of(
    models: Models, policy: nn.Module, reward: RewardModel | None
) -> tuple[nn.Module | None, ScalarHead] | None:
    """The critic's backbone, None where it is the policy's or a copy of it, and its head; None without a critic."""
    config, named = models.config.critic_config, models.config.critic_config.model
    if not ALGORITHMS[models.config.trainer_config.algorithm].needs_critic:
        return None
    if named == "shared":
        return None, models.head(policy, config.model_head_hidden_size)
    mlp_size, start, keys = config.model_head_hidden_size, backbone_of(policy), models.config.actor_config
    if named not in (None, models.config.reward_config.model):
        start, keys = models.backbone(named, "critic_config.model"), QuantizationKeys()
    elif reward is not None and reward.pooling == "last" and _alike(reward.backbone, policy):
        start, keys = reward.backbone, models.config.reward_config
        mlp_size = models.config.reward_config.model_head_hidden_size
    head = models.head(start, mlp_size)
    if config.peft_enable:
        return models.on_base(start, load_peft_config(models.config, "critic_config"), keys), head
    if start is backbone_of(policy) and not has_adapters(policy):
        return None, head
    return models.like(start), head


def _alike(backbone: nn.Module, policy: nn.Module) -> bool:
    """Of one kind and, as far as their sizes say, with one tokenizer."""
    first, second = backbone.config.get_text_config(), policy.config.get_text_config()
    return first.model_type == second.model_type and first.vocab_size == second.vocab_size


def made_ready(actor_critic: ActorCritic, frozen: list[nn.Module], models: Models) -> MasterWeights | None:
    """As `PPOBuilder.updater` has it before the update."""
    trainer = models.config.trainer_config
    masters = prepare_models(
        actor_critic.backbones(),
        frozen,
        "bf16" if models.rl_in_bf16() else "fp32",
        models.fake_device.device,
        models.config.actor_config.attn_implementation is None,
        use_kernels(trainer.model_kernels),
        small_twins_match,
    )
    if trainer.gradient_checkpointing:
        for model in actor_critic.backbones():
            recompute_activations(model, "trainer_config.gradient_checkpointing")
    return masters


def preparation(actor_critic: ActorCritic, frozen: list[nn.Module], models: Models) -> list[Phase]:
    """Where RL computes in bfloat16: models come in float32, and a copy of each is made.

    On a GPU they all lie there by then. On a CPU their files are read when they are copied, one after the other.
    """
    if not models.rl_in_bf16():
        return []
    seen: set[int] = set()
    sizes = []  # of each model what is its own: in float32, and what of it stays in float32
    for model in (*actor_critic.backbones(), *frozen):
        own = [each for each in model.parameters() if id(each) not in seen and each.dtype == torch.float32]
        seen.update(map(id, own))
        stays = model in actor_critic.backbones()
        kept = sum(each.nbytes for each in own if stays and (each.requires_grad or not has_adapters(model)))
        sizes.append((sum(each.nbytes for each in own), kept))
    if models.fake_device.device.type == "cpu":
        most = done = 0
        for whole, kept in sizes:
            most = max(most, done + whole + whole // 2)
            done += whole // 2 + kept
    else:
        most = sum(whole + kept // 2 for whole, kept in sizes)
    return [Phase(PREPARATION, {"models in float32 and bfloat16": most})]
