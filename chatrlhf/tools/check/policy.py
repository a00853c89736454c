"""Checks of a fresh PPO: the policy is its own reference, the first ratio is 1, microbatches add up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from chatrlhf.config.schema import Config
from chatrlhf.functional.importance import logprob_gap
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.models.weight_sharing import Base
from chatrlhf.rl.data_parallel import rollout_rows
from chatrlhf.rl.experience import make_experience
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.update import Updater
from chatrlhf.runtime.check_result import CheckResult, judged
from chatrlhf.runtime.device import resolve_rl_precision
from chatrlhf.runtime.seeding import step_seed
from chatrlhf.stages.build_ppo import PPOBuilder
from chatrlhf.stages.context import require
from chatrlhf.stages.readiness import check_readiness
from chatrlhf.stages.rl import starting_models
from chatrlhf.tools.check.models import judge_of
from chatrlhf.tools.check.resources import check_disk
from chatrlhf.tools.check.session import Session, same_random_numbers
from chatrlhf.tools.check.training import check_microbatches
from chatrlhf.types import Experience, ScoredRollout

ROLLOUTS, NEW_TOKENS = 8, 16
# Of |ratio - 1| and of nats: one forward, of other rows beside each other.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}


def check_policy(session: Session) -> Iterator[CheckResult]:
    """What RL begins with, on a rollout of a few prompts."""
    if "RL" not in session.stages:
        return
    if session.stages == ["RL"]:
        check_readiness(
            session.context(FunctionReward(some_score, "of a check") if session.has_function else None), "RL"
        )
        yield CheckResult(
            "RL readiness", "pass", "actor and reward model that are in the folder have learned something"
        )
    with same_random_numbers(session.config.seed):
        trainer = fresh_trainer(session)
        scored, experience = first_experience(trainer)
        coef = trainer.kl.coef
        ratio_error = float(trainer.updater.backward(experience, coef)["ppo/ratio_error"])
        precision = resolve_rl_precision(session.config.trainer_config.precision, session.device)
        yield from fresh_policy_results(scored, ratio_error, TOLERANCE[precision])
        keep = session.config.trainer_config.n_checkpoints_to_keep
        yield check_disk(session, "RL", trainer.updater.actor_critic, keep)
        if session.deep:
            sizes = (len(experience), 1)
            whole, parts = (gradient_of(trainer.updater, experience, coef, size) for size in sizes)
            yield check_microbatches("RL batch arithmetic", whole, parts, len(experience), precision)


def fresh_policy_results(scored: ScoredRollout, ratio_error: float, tolerance: float) -> Iterator[CheckResult]:
    """Of a policy that was not updated yet: KL 0, ratio 1, and a sampler that draws from it.

    Args:
        ratio_error: mean |ratio - 1| of the update's first forward.
    """
    mask = scored.rollout.response_mask
    kl = float((scored.old_logprobs - scored.ref_logprobs)[mask].abs().max())
    yield judged(
        "RL KL of the fresh policy",
        f"policy and reference differ by at most {kl:.1e} nats a token",
        "they start from other weights than each other; set actor_config.model to what the actor was trained from",
        fail=not kl <= tolerance,
    )
    yield judged(
        "RL first ratio",
        f"|ratio - 1| is {ratio_error:.1e} on average before the first update",
        "the model gives a row other probabilities in other company; set trainer_config.model_kernels to False and "
        "try again, or use precision: fp32",
        fail=not ratio_error <= tolerance,
    )
    gap, _ = logprob_gap(scored.old_logprobs, scored.rollout.sampling_logprobs, mask)
    yield judged(
        "RL sampler",
        f"it draws with probabilities {gap:.1e} nats a token from the policy's",
        "the KV cache of this model computes something else than its forward; report it, with the model's name",
        fail=not gap <= tolerance,
    )


def fresh_trainer(session: Session) -> PPOTrainer:
    """The trainer of the RL stage, of a few short rollouts, that nothing is written by."""
    config = short(session.config)

    def judge(shared: Base | None) -> RewardScorer | None:
        return None if session.has_function else judge_of(session)

    ctx = replace(session.context(FunctionReward(some_score, "of a check")), config=config)
    models = starting_models(ctx, session.device, judge)
    rows = replace(require(session.inputs.prompts), held_out=[])
    return PPOBuilder(config, session.device, ctx.log).build(models, rows, None)


def some_score(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    """A reward that is not the same for all, so that there is a gradient; the user's is not called for this."""
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def short(config: Config) -> Config:
    """The same with one step of a few short rollouts, which this package samples."""
    trainer = config.trainer_config
    rollouts = trainer.samples_per_prompt * max(ROLLOUTS // trainer.samples_per_prompt, 1)
    gen = trainer.gen_kwargs.model_copy(update={"max_new_tokens": NEW_TOKENS})
    few = {"num_rollouts": rollouts, "total_episodes": rollouts, "batch_size": rollouts, "chunk_size": rollouts}
    changes = few | {"gen_kwargs": gen, "rollout_backend": "chatrlhf", "eval_fn": None}
    return config.model_copy(update={"trainer_config": trainer.model_copy(update=changes)})


def first_experience(trainer: PPOTrainer) -> tuple[ScoredRollout, Experience]:
    """What the first step would learn from."""
    prompts = trainer.prompts.batch(0)
    rows = rollout_rows(prompts.group_ids)
    rollout = trainer.engine.generate(prompts, step_seed(trainer.seed, 0, "rollout"), rows)
    scored = trainer.scorer.score(rollout, rows)
    experience = make_experience(scored, trainer.algorithm, trainer.estimation(trainer.kl.coef))
    return scored, experience.to(trainer.updater.device)


def gradient_of(updater: Updater, experience: Experience, coef: float, micro_batch_size: int) -> list[Tensor]:
    """The gradient of all rows, cut into microbatches of at most so many, by optimizer group, on the CPU."""
    updater.settings = replace(updater.settings, micro_batch_size=micro_batch_size)
    updater.backward(experience, coef)
    assert isinstance(updater.backend, PlainBackend)
    return [flat.cpu() for flat in updater.backend.gradients.flat]
