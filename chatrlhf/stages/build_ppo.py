"""The parts of the RL stage, each made from its own keys and put together into one trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import prompt_batch
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import Rows
from chatrlhf.errors import DataError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.kernels import use_kernels
from chatrlhf.models.kernels.activation_checkpointing import recompute_activations
from chatrlhf.models.loading.lora import has_adapters
from chatrlhf.models.reference import Reference
from chatrlhf.models.stop_tokens import ids_without_token, refuse_unknown_ids, stop_tokens, vocabulary_rows
from chatrlhf.rl.experience import ALGORITHMS, Estimation
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.held_out import HeldOut
from chatrlhf.rl.kl_controller import KLController
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.progress import Progress
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import ModelReward, RewardSource
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.sharded_backend import EngineBackend, shard_actor_critic
from chatrlhf.rl.update import Updater, UpdateSettings
from chatrlhf.rl.user_functions import load_function
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.rollout.sampler import Sampler
from chatrlhf.rollout.vllm import VllmSampler
from chatrlhf.runtime.checkpoints import CheckpointStore
from chatrlhf.runtime.collectives import is_main, world_size
from chatrlhf.runtime.device import DTYPES, resolve_rl_precision
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.seeding import step_seed
from chatrlhf.sharding.accelerate_env import Sharding, shards_params
from chatrlhf.sharding.launch import engine_of

DEFAULT_NEW_TOKENS = 128
NOTHING = Progress()


def assemble_ppo(
    config: Config,
    actor_critic: ActorCritic,
    reference: Reference,
    encoder: Encoder,
    reward: RewardSource,
    rows: Rows,
    device: torch.device,
    log: RunLog,
    checkpoints: CheckpointStore,
    sharding: Sharding = None,
    done: Progress = NOTHING,
) -> PPOTrainer:
    """The trainer that the configuration describes.

    Args:
        actor_critic, reference: with one sampling distribution; on ``device``, or, where weights are sharded, in the
            CPU's memory.
        sharding: who shards what is trained; None: every process has all of it.
        reward: a reward model of its own: what else was made from its weights has a copy.
        rows: prompts, and held-out prompts where there are any.
        done: before the run is resumed.

    Raises:
        DataError: no prompt leaves room for a response.
    """
    trainer, algorithm = config.trainer_config, ALGORITHMS[config.trainer_config.algorithm]
    limits = _limits(config, encoder)
    pad_id = encoder.tokenizer.pad_token_id
    source = trainer.reads_from("trainer_config", "examples_path")
    prompt_ids, prompts, kept = _encoded_prompts(rows.train, encoder, limits, log, source)
    epochs = rows.epochs.only(kept, source)
    engine = _sampler(config, actor_critic, encoder, limits, log, sharding)
    scaling = RewardScaling(
        trainer.scale_reward, trainer.cliprange_reward, trainer.missing_eos_penalty, ref_std=trainer.ref_std
    )
    # A forward alone keeps less than half of what the update's forward and backward do.
    scorer = Scorer(actor_critic, reference, reward, scaling, device, 2 * max(trainer.micro_batch_size, 1))
    frozen = [reference.model]
    if isinstance(reward, ModelReward):
        frozen.append(reward.scorer.model.backbone)
    settings = UpdateSettings(
        epochs=trainer.ppo_epochs,
        batch_size=trainer.batch_size,
        micro_batch_size=trainer.micro_batch_size,
        cliprange=trainer.cliprange,
        cliprange_value=trainer.cliprange_value,
        vf_coef=trainer.vf_coef,
        entropy_coef=trainer.entropy_coef,
        max_grad_norm=trainer.max_grad_norm,
        foreign_sampler=isinstance(engine, VllmSampler),
        importance_cap=trainer.importance_cap,
    )
    updater = _updater(config, actor_critic, frozen, settings, device, sharding, log, done)
    held_out = None
    if rows.held_out:
        held_ids, held_prompts, _ = _encoded_prompts(rows.held_out, encoder, limits, log, "the held-out prompts")
        batch = prompt_batch(held_ids, held_prompts, pad_id)
        eval_fn = load_function(trainer.eval_fn, "trainer_config.eval_fn") if trainer.eval_fn else None
        held_out = HeldOut(batch, engine, scorer, eval_fn, step_seed(config.seed, 0, "held-out"))
    samples = trainer.samples_per_prompt
    prompts_a_step = trainer.num_rollouts // samples
    return PPOTrainer(
        prompts=PromptSchedule(
            prompt_ids, prompts, pad_id, prompts_a_step, samples, config.seed, epochs, done.steps, done.prompts
        ),
        engine=engine,
        scorer=scorer,
        updater=updater,
        algorithm=algorithm,
        estimation=lambda coef: Estimation(coef, trainer.gamma, trainer.lam, trainer.whiten_advantages),
        kl=KLController(trainer.init_kl_coef, trainer.target, trainer.horizon),
        num_steps=done.num_steps(trainer),
        seed=config.seed,
        log=log,
        checkpoints=checkpoints,
        checkpoint_steps=trainer.checkpoint_steps,
        held_out=held_out,
        eval_interval=trainer.eval_interval,
        sharding=sharding,
        done=done,
    )


def _updater(
    config: Config,
    actor_critic: ActorCritic,
    frozen: list[nn.Module],
    settings: UpdateSettings,
    device: torch.device,
    sharding: Sharding,
    log: RunLog,
    done: Progress,
) -> Updater:
    """What improves the actor-critic, whose models and the frozen ones are made ready for the hot path."""
    trainer, algorithm = config.trainer_config, ALGORITHMS[config.trainer_config.algorithm]
    precision = resolve_rl_precision(trainer.precision, device)
    groups = actor_critic.parameter_groups(trainer.actor_lr, trainer.critic_lr)
    own_attention, kernels = config.actor_config.attn_implementation is None, use_kernels(trainer.model_kernels)

    def recompute(trained: ActorCritic) -> None:
        if trainer.gradient_checkpointing:
            for model in trained.backbones():
                recompute_activations(model, "trainer_config.gradient_checkpointing")

    if sharding is not None:
        prepare_models(actor_critic.backbones(), frozen, "fp32", device, own_attention, kernels)
        sharded = shard_actor_critic(
            actor_critic,
            frozen,
            recompute,
            partial(engine_of, sharding, config),
            groups,
            shards_params(sharding),
            DTYPES[precision],
            device,
            keep_frozen=is_main() and not has_adapters(actor_critic.policy),
        )
        kinds = dict.fromkeys(type(engine.model).__name__ for engine in sharded.engines)
        log.note(f"RL: trained by {sharding} in {world_size()} processes ({', '.join(kinds)})")
        schedulers = [_schedule(engine.optimizer, config, done) for engine in sharded.engines]
        return Updater(sharded.trained, algorithm, settings, device, EngineBackend(sharded, schedulers, device))
    masters = prepare_models(actor_critic.backbones(), frozen, precision, device, own_attention, kernels)
    recompute(actor_critic)
    if masters is not None:
        groups = masters.groups(groups)
    optimizer = torch.optim.AdamW(
        groups,
        betas=trainer.betas,
        weight_decay=trainer.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    backend = PlainBackend(actor_critic, optimizer, _schedule(optimizer, config, done), device, masters)
    return Updater(actor_critic, algorithm, settings, device, backend)


def sampling_distribution(
    config: Config, encoder: Encoder, policy: nn.Module, note: Callable[[str], None]
) -> SamplingDistribution:
    """The one distribution of rollouts, policy scoring and reference.

    Args:
        policy: ids of its head that no token has are never sampled.
        note: is told how many these are.

    Raises:
        ConfigError: `gen_kwargs` names an id that the policy does not have.
    """
    gen, tokenizer, rows = config.trainer_config.gen_kwargs, encoder.tokenizer, vocabulary_rows(policy)
    refuse_unknown_ids(gen, rows)
    eos = gen.eos_token_id if gen.eos_token_id is not None else stop_tokens(policy, tokenizer).ids
    eos_ids = (eos,) if isinstance(eos, int) else tuple(eos)
    unused = ids_without_token(tokenizer, rows)
    if unused:
        note(f"RL: {len(unused)} of the model's {rows:,} ids have no token in the tokenizer; they are never sampled")
    forbidden = {*gen.forbidden_tokens, *({tokenizer.pad_token_id, *unused} - {*eos_ids})}
    temperature = gen.temperature or config.actor_config.temperature or 1.0
    return SamplingDistribution(temperature, eos_ids, tuple(sorted(forbidden)))


def _sampler(
    config: Config, actor_critic: ActorCritic, encoder: Encoder, limits: Limits, log: RunLog, sharding: Sharding
) -> Sampler:
    """What samples the rollouts, from the policy as it is at any time."""
    trainer, tokenizer = config.trainer_config, encoder.tokenizer
    policy, distribution, stop = actor_critic.policy, actor_critic.distribution, trainer.gen_kwargs.stop

    if trainer.rollout_backend == "chatrlhf":
        gathered = shards_params(sharding)
        return RolloutEngine(
            policy,
            distribution,
            limits,
            tokenizer.pad_token_id,
            encoder.reply,
            stop,
            trainer.chunk_size,
            static=False if gathered else None,  # gathered weights have other addresses in each rollout
            moves_weights=sharding is None or gathered,  # otherwise they are parts of DeepSpeed's buffers
            fused_step=use_kernels(trainer.model_kernels),
        )
    log.note("RL: vLLM samples, with random numbers of its own: a run that is resumed or repeated goes another way")
    return VllmSampler(
        policy,
        tokenizer,
        distribution,
        limits,
        encoder.reply,
        trainer.vllm,
        tokenizer.pad_token_id,
        stop,
        trainer.chunk_size,
        config.actor_config.trust_remote_code,
    )


def _limits(config: Config, encoder: Encoder) -> Limits:
    gen, actor = config.trainer_config.gen_kwargs, config.actor_config
    longest = min(encoder.max_length, gen.max_length or encoder.max_length)
    # max_length alone bounds a response, as in trlX; otherwise a response has a limit of its own.
    default = longest if gen.max_length else DEFAULT_NEW_TOKENS
    return Limits(
        max_new_tokens=gen.max_new_tokens or actor.max_tokens or default,
        max_length=longest,
        min_new_tokens=gen.min_new_tokens if gen.min_new_tokens is not None else actor.min_tokens or 0,
        min_length=gen.min_length or 0,
    )


def _encoded_prompts(
    prompts: list[Prompt], encoder: Encoder, limits: Limits, log: RunLog, source: str
) -> tuple[list[list[int]], list[Prompt], list[int]]:
    """Prompts as ids and as they were, and their numbers; without those that leave no room for a response."""
    encoded = [(encoder.prompt(prompt), prompt) for prompt in prompts]
    if any(not ids for ids, _ in encoded):
        row = next(i for i, (ids, _) in enumerate(encoded, start=1) if not ids)
        raise DataError(f"{source}, row {row}: the prompt is empty, and this tokenizer has no BOS token to start from")
    kept = [i for i, (ids, _) in enumerate(encoded) if len(ids) < limits.max_length]
    if not kept:
        shortest = min(len(ids) for ids, _ in encoded)
        raise DataError(
            f"{source}: all {len(prompts)} prompts fill the context (shortest {shortest} tokens, limit "
            f"{limits.max_length}); raise actor_config.max_sequence_length or gen_kwargs.max_length"
        )
    if len(kept) < len(encoded):
        log.warn(f"RL: {len(encoded) - len(kept)} of {len(encoded)} rows of {source} leave no room for a response")
    return [encoded[i][0] for i in kept], [encoded[i][1] for i in kept], kept


def _schedule(optimizer: torch.optim.Optimizer, config: Config, done: Progress) -> Any:
    from transformers import get_scheduler

    trainer = config.trainer_config
    return get_scheduler(trainer.lr_scheduler, optimizer, trainer.warmup_steps, done.num_optimizer_steps(trainer))
