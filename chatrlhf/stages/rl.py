"""RL: the actor learns from the reward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chatrlhf.config.load import load_peft_config
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import corpus
from chatrlhf.models.critic_init import make_actor_critic
from chatrlhf.models.for_stages import load_actor, load_policy, trained_reward_model
from chatrlhf.models.loading.lora import add_adapters, base_of, has_adapters, where
from chatrlhf.models.loading.model_info import trained_count
from chatrlhf.models.loading.quantization import ready_for_adapters
from chatrlhf.models.reward_model import RewardScorer, scorer_of_critic
from chatrlhf.models.stop_tokens import stop_tokens, write_stop_tokens
from chatrlhf.models.weight_sharing import Base, share_weights
from chatrlhf.rl.comparison import show_comparison
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.progress import Progress
from chatrlhf.rl.rewards import ModelReward, RewardSource
from chatrlhf.rl.verdict import judge
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.runtime.checkpoints import StageFiles
from chatrlhf.runtime.collectives import broadcast, rank
from chatrlhf.runtime.device import resolve_rl_precision
from chatrlhf.sharding.accelerate_env import Sharding, environment_for, shards_params
from chatrlhf.sharding.launch import sharding_of
from chatrlhf.stages.build_ppo import PPOBuilder, PPOModels, sampling_distribution
from chatrlhf.stages.context import RunContext, policy_encoder, publish_policy, record, require


def run_rl(ctx: RunContext) -> dict[str, Any]:
    """RL: improve the actor against the reward; leaves ``actor_rl/`` and ``critic/``."""
    sharding = sharding_of(ctx.config, "RL")
    with environment_for(sharding):
        return _run_rl(ctx, sharding)


def _run_rl(ctx: RunContext, sharding: Sharding) -> dict[str, Any]:
    config, trainer_config = ctx.config, ctx.config.trainer_config
    files = ctx.files("RL", trainer_config.n_checkpoints_to_keep)
    _, checkpoint = files.newest or (0, None)
    done = Progress.of(checkpoint, trainer_config)
    done.num_steps(trainer_config)  # refused, if it is, before models are loaded
    if ctx.resume and checkpoint is None:
        ctx.log.note("RL: no checkpoint was published yet, so it starts at its beginning")
    # What will be sharded need not fit on one device first.
    place = torch.device("cpu") if shards_params(sharding) else ctx.device

    def trained_reward(shared: Base | None) -> RewardScorer | None:
        if ctx.reward is not None:
            return None
        # A critic that is trained by adapters trains those of the reward model further: on the base that is saved.
        apart = config.critic_config.peft_enable
        return trained_reward_model(ctx.dir / "reward", config.reward_config, ctx.device, shared, apart)

    models = starting_models(ctx, place, trained_reward)
    return _train(ctx, models, files, sharding, done, checkpoint)


def starting_models(
    ctx: RunContext, place: torch.device, reward_model: Callable[[Base | None], RewardScorer | None]
) -> PPOModels:
    """What PPO begins with.

    Args:
        place: where the policy is made.
        reward_model: gives the reward model, which may be built on the weights it is given; None where a function
            gives the reward.
    """
    config, trainer_config = ctx.config, ctx.config.trainer_config
    policy, encoder, base = _starting_policy(ctx, place)
    shared = Base(policy, base) if has_adapters(policy) else None
    reward_scorer = reward_model(shared)
    reward: RewardSource = ctx.reward or ModelReward(reward_scorer, encoder)
    distribution = sampling_distribution(config, encoder, policy, ctx.log.note)
    # What gen_kwargs names besides ends the replies of the policy that is left behind, too.
    ends = stop_tokens(policy, encoder.tokenizer).ids
    write_stop_tokens(policy, tuple(dict.fromkeys([*ends, *distribution.eos_token_ids])))
    algorithm = ALGORITHMS[trainer_config.algorithm]
    actor_critic, critic_line = make_actor_critic(
        policy,
        encoder.tokenizer,
        reward_scorer,
        config.critic_config,
        distribution,
        algorithm.needs_critic,
        config.reward_config.model,
        trainer_config.num_layers_unfrozen,
        load_peft_config(config, "critic_config") if config.critic_config.peft_enable else None,
        base,
    )
    actor_critic.to(place)
    if shared is not None:
        critic_line += "; the policy is trained by adapters, its reference is built on the same weights"
    if shared is not None and reward_scorer is not None and share_weights(policy, reward_scorer.model):
        critic_line += ", and so does the reward model"
    broadcast(actor_critic.parameters())
    reference = actor_critic.reference()
    ctx.log.note(
        f"RL: {trainer_config.algorithm}, {trained_count(actor_critic):,} parameters in training; {critic_line}"
    )
    return PPOModels(actor_critic, reference, encoder, reward)


def _train(
    ctx: RunContext, models: PPOModels, files: StageFiles, sharding: Sharding, done: Progress, checkpoint: Path | None
) -> dict[str, Any]:
    """PPO from its beginning or from a checkpoint, and what it leaves."""
    config, trainer_config, rows = ctx.config, ctx.config.trainer_config, require(ctx.inputs.prompts)
    actor_critic, encoder = models.actor_critic, models.encoder
    policy = actor_critic.policy
    shown = ctx.inputs.actor.held_out if ctx.inputs.actor is not None else ()
    builder = PPOBuilder(config, ctx.device, ctx.log, sharding, done, shown)
    trainer = builder.build(models, rows, files.store)
    files.begin(actor_critic)
    if rank() > 0:
        from transformers import set_seed

        # Everything is made; from here on a reward function that draws random numbers draws others on each rank.
        set_seed(ctx.seed("RL") + rank())
    trainer.train(checkpoint)
    with trainer.updater.backend.full_precision():
        publish_policy(ctx.dir / "actor_rl", policy, encoder)
        if (critic := actor_critic.value_function()) is not None:
            # In the reward model's file format: its score of a text is V behind the text's last token.
            publish_folder(ctx.dir / "critic", scorer_of_critic(*critic, encoder).save)
    trainer.updater.backend.close()
    if trainer.before is not None and trainer.after is not None:
        show_comparison(ctx.log.console, trainer.before, trainer.after, trainer_config.eval_best)
    for line in trainer.guards.summary() if trainer.guards is not None else ():
        ctx.log.note(f"guard {line}")
    if trainer.before is not None and trainer.after is not None:
        ctx.log.note(str(judge(trainer.before, trainer.after)))
    return record(ctx, "RL", "actor_rl", config.actor_config.model, rows)


def _starting_policy(ctx: RunContext, device: torch.device) -> tuple[torch.nn.Module, Encoder, str]:
    """The fine-tuned actor, or the model that the configuration names, where no ACTOR stage has run.

    Returns:
        The policy, with the adapters that it is trained by; its encoder; where its weights are, or those that its
        adapters are built on.
    """
    settings = ctx.config.actor_config
    precision = resolve_rl_precision(ctx.config.trainer_config.precision, ctx.device)
    folder = ctx.trained("ACTOR", "actor", settings.model)
    apart = settings.peft_enable
    if folder is not None:
        ctx.warn_unapplied_scaling(str(folder), heeded=False)
    else:
        settings = ctx.start()
        ctx.warn_unapplied_scaling(settings.model, heeded=not apart)
        ctx.log.warn(f"RL: no fine-tuned actor in this folder, so the policy starts from {ctx.start_name()} as it is")
        torch.manual_seed(ctx.seed("RL"))  # a resumed run's policy and reference start from the same random weights
        if apart and base_of(settings.model) is not None:
            folder = Path(settings.model)
    template = None
    if folder is not None:
        model, tokenizer, template = load_policy(folder, device, apart, settings, precision)
        place = base_of(str(folder)) or where(str(folder))
    else:
        model, tokenizer = load_actor(settings, corpus(ctx.config), device, precision)
        place = where(settings.model)
    if apart and not has_adapters(model):
        model = ready_for_adapters(model)
        add_adapters(model, load_peft_config(ctx.config), place, settings.revision if folder is None else None)
    return model, policy_encoder(ctx, "RL", model, tokenizer, template), place
