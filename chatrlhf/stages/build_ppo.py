"""The parts of the RL stage, each made from its own keys and put together into one trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from chatrlhf.config.rl import TrainerConfig
from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import prompt_batch
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import Rows
from chatrlhf.data.stage_rows import ActorRow
from chatrlhf.errors import DataError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.kernels import use_kernels
from chatrlhf.models.kernels.activation_checkpointing import recompute_activations
from chatrlhf.models.loading.lora import has_adapters
from chatrlhf.models.reference import Reference
from chatrlhf.models.stop_tokens import ids_without_token, refuse_unknown_ids, stop_tokens, vocabulary_rows
from chatrlhf.rl.demonstrations import as_rollout
from chatrlhf.rl.experience import ALGORITHMS, Estimation
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.guards import Guards
from chatrlhf.rl.held_out import HeldOut
from chatrlhf.rl.kl_controller import KLController
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.progress import Progress
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import ModelReward, RewardSource
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.sharded_backend import EngineBackend, ShardedModels, shard_actor_critic
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


@dataclass(frozen=True)
class PPOModels:
    """What PPO works with.

    ``actor_critic`` and ``reference`` have one sampling distribution. They are on the builder's device or, where
    weights are sharded, in the CPU's memory. A reward model is one of its own: what else was made from its weights has
    a copy.
    """

    actor_critic: ActorCritic
    reference: Reference
    encoder: Encoder
    reward: RewardSource

    @property
    def frozen(self) -> list[nn.Module]:
        """The models that are not trained."""
        judge = [self.reward.scorer.model.backbone] if isinstance(self.reward, ModelReward) else []
        return [self.reference.model, *judge]


@dataclass(frozen=True)
class PPOBuilder:
    """Builds the trainer of the RL stage from its keys, a method a part.

    Args:
        sharding: who shards what is trained; None: every process has all of it.
        done: before the run is resumed.
        demonstrations: held-out rows of the ACTOR stage, where it was a part of this run.
    """

    config: Config
    device: torch.device
    log: RunLog
    sharding: Sharding = None
    done: Progress = NOTHING
    demonstrations: Sequence[ActorRow] = ()

    def build(self, models: PPOModels, rows: Rows, checkpoints: CheckpointStore) -> PPOTrainer:
        """The trainer that the configuration describes.

        Args:
            rows: prompts, and held-out prompts where there are any.

        Raises:
            DataError: no prompt leaves room for a response.
        """
        keys, limits = self.keys, _limits(self.config, models.encoder)
        prompts = self.prompts(rows, models.encoder, limits)
        engine = self.sampler(models, limits)
        scorer = self.scorer(models)
        return PPOTrainer(
            prompts=prompts,
            engine=engine,
            scorer=scorer,
            updater=self.updater(models, foreign_sampler=isinstance(engine, VllmSampler)),
            algorithm=ALGORITHMS[keys.algorithm],
            estimation=lambda coef: Estimation(coef, keys.gamma, keys.lam, keys.whiten_advantages),
            kl=KLController(keys.init_kl_coef, keys.target, keys.horizon),
            num_steps=self.done.num_steps(keys),
            seed=self.config.seed,
            log=self.log,
            checkpoints=checkpoints,
            checkpoint_steps=keys.checkpoint_steps,
            held_out=self.held_out(rows, models, limits, engine, scorer),
            eval_interval=keys.eval_interval,
            sharding=self.sharding,
            done=self.done,
            skipped_limit=self.config.guards_config.skipped_steps,
            guards=Guards(self.config.guards_config, self.log.warn),
        )

    @property
    def keys(self) -> TrainerConfig:
        return self.config.trainer_config

    def prompts(self, rows: Rows, encoder: Encoder, limits: Limits) -> PromptSchedule:
        """Which prompts each step samples."""
        source = self.keys.reads_from("trainer_config", "examples_path")
        ids, prompts, kept = _encoded_prompts(rows.train, encoder, limits, self.log, source)
        samples, done = self.keys.samples_per_prompt, self.done
        return PromptSchedule(
            ids,
            prompts,
            encoder.tokenizer.pad_token_id,
            self.keys.num_rollouts // samples,
            samples,
            self.config.seed,
            rows.epochs.only(kept, source),
            done.steps,
            done.prompts,
        )

    def sampler(self, models: PPOModels, limits: Limits) -> Sampler:
        """What samples the rollouts, from the policy as it is at any time."""
        keys, encoder = self.keys, models.encoder
        policy, distribution = models.actor_critic.policy, models.actor_critic.distribution
        pad_id, stop = encoder.tokenizer.pad_token_id, keys.gen_kwargs.stop
        if keys.rollout_backend == "chatrlhf":
            gathered = shards_params(self.sharding)
            return RolloutEngine(
                policy,
                distribution,
                limits,
                pad_id,
                encoder.reply,
                stop,
                keys.chunk_size,
                static=False if gathered else None,  # gathered weights have other addresses in each rollout
                moves_weights=self.sharding is None or gathered,  # otherwise they are parts of DeepSpeed's buffers
                fused_step=use_kernels(keys.model_kernels),
            )
        self.log.note(
            "RL: vLLM samples, with random numbers of its own: a run that is resumed or repeated goes another way"
        )
        return VllmSampler(
            policy,
            encoder.tokenizer,
            distribution,
            limits,
            encoder.reply,
            keys.vllm,
            pad_id,
            stop,
            keys.chunk_size,
            self.config.actor_config.trust_remote_code,
        )

    def scorer(self, models: PPOModels) -> Scorer:
        """What scores rollouts, and reads them with policy, critic and reference."""
        keys = self.keys
        scaling = RewardScaling(
            keys.scale_reward, keys.cliprange_reward, keys.missing_eos_penalty, ref_std=keys.ref_std
        )
        # A forward alone keeps less than half of what the update's forward and backward do.
        rows = 2 * max(keys.micro_batch_size, 1)
        return Scorer(models.actor_critic, models.reference, models.reward, scaling, self.device, rows)

    def held_out(
        self, rows: Rows, models: PPOModels, limits: Limits, engine: Sampler, scorer: Scorer
    ) -> HeldOut | None:
        """The judgment of held-out prompts, where there are any."""
        if not rows.held_out:
            return None
        encoder = models.encoder
        ids, prompts, _ = _encoded_prompts(rows.held_out, encoder, limits, self.log, "the held-out prompts")
        batch = prompt_batch(ids, prompts, encoder.tokenizer.pad_token_id)
        eval_fn = load_function(self.keys.eval_fn, "trainer_config.eval_fn") if self.keys.eval_fn else None
        demonstrations = as_rollout(self.demonstrations, encoder, models.actor_critic.distribution)
        seed = step_seed(self.config.seed, 0, "held-out")
        return HeldOut(batch, engine, scorer, eval_fn, seed, demonstrations)

    def updater(self, models: PPOModels, foreign_sampler: bool) -> Updater:
        """What improves the actor-critic, whose models and the frozen ones are made ready for the hot path."""
        keys, actor_critic, algorithm = self.keys, models.actor_critic, ALGORITHMS[self.keys.algorithm]
        settings = update_settings(keys, foreign_sampler)
        precision = resolve_rl_precision(keys.precision, self.device)
        prepare = partial(
            prepare_models,
            actor_critic.backbones(),
            models.frozen,
            device=self.device,
            own_attention=self.config.actor_config.attn_implementation is None,
            kernels=use_kernels(keys.model_kernels),
        )
        if self.sharding is not None:
            prepare(precision="fp32")
            sharded = self._sharded(models, DTYPES[precision])
            schedulers = [_schedule(engine.optimizer, self.config, self.done) for engine in sharded.engines]
            return Updater(
                sharded.trained, algorithm, settings, self.device, EngineBackend(sharded, schedulers, self.device)
            )
        masters = prepare(precision=precision)
        self._checkpoint_activations(actor_critic)
        groups = actor_critic.parameter_groups(keys.actor_lr, keys.critic_lr)
        optimizer = torch.optim.AdamW(
            masters.groups(groups) if masters is not None else groups,
            betas=keys.betas,
            weight_decay=keys.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        scheduler = _schedule(optimizer, self.config, self.done)
        backend = PlainBackend(actor_critic, optimizer, scheduler, self.device, masters)
        return Updater(actor_critic, algorithm, settings, self.device, backend, self.log.warn)

    def _sharded(self, models: PPOModels, dtype: torch.dtype) -> ShardedModels:
        """The models in the hands of engines."""
        actor_critic, keys = models.actor_critic, self.keys
        sharded = shard_actor_critic(
            actor_critic,
            models.frozen,
            self._checkpoint_activations,
            partial(engine_of, self.sharding, self.config),
            actor_critic.parameter_groups(keys.actor_lr, keys.critic_lr),
            shards_params(self.sharding),
            dtype,
            self.device,
            keep_frozen=is_main() and not has_adapters(actor_critic.policy),
        )
        kinds = dict.fromkeys(type(engine.model).__name__ for engine in sharded.engines)
        self.log.note(f"RL: trained by {self.sharding} in {world_size()} processes ({', '.join(kinds)})")
        return sharded

    def _checkpoint_activations(self, trained: ActorCritic) -> None:
        if self.keys.gradient_checkpointing:
            for model in trained.backbones():
                recompute_activations(model, "trainer_config.gradient_checkpointing")


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


def update_settings(keys: TrainerConfig, foreign_sampler: bool = False) -> UpdateSettings:
    """The update's knobs, from the keys of the same names."""
    return UpdateSettings(
        epochs=keys.ppo_epochs,
        batch_size=keys.batch_size,
        micro_batch_size=keys.micro_batch_size,
        cliprange=keys.cliprange,
        cliprange_value=keys.cliprange_value,
        vf_coef=keys.vf_coef,
        entropy_coef=keys.entropy_coef,
        max_grad_norm=keys.max_grad_norm,
        foreign_sampler=foreign_sampler,
        importance_cap=keys.importance_cap,
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
