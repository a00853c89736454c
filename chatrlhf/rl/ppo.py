"""The RL stage: sample, score, learn; the loop everyone comes to read is `PPOTrainer.train`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from chatrlhf.errors import CheckpointError, DivergedError, Interrupted, NonFiniteRewardError, StoppedByGuardError
from chatrlhf.errors.boundary import doing
from chatrlhf.functional.importance import logprob_gap
from chatrlhf.functional.kl import kl_of_replies
from chatrlhf.functional.masked import explained_variance
from chatrlhf.functional.repetition import distinct_ngrams, repeated_ngrams
from chatrlhf.rl.data_parallel import rollout_rows
from chatrlhf.rl.experience import Algorithm, Estimation, make_experience
from chatrlhf.rl.guards import Guards
from chatrlhf.rl.held_out import HeldOut, HeldOutReport
from chatrlhf.rl.kl_controller import KLController
from chatrlhf.rl.progress import STATE, Progress
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.update import Updater
from chatrlhf.rollout.sampler import Sampler
from chatrlhf.runtime.checkpoints import CheckpointStore
from chatrlhf.runtime.collectives import gather_objects, rank, world_size
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.finite import moments, require_finite, trained
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.seeding import generator_states, set_generator_states, step_generator, step_seed
from chatrlhf.runtime.signals import StopRequest
from chatrlhf.runtime.skipped_steps import SkippedSteps
from chatrlhf.runtime.watchdog import beat
from chatrlhf.sharding.accelerate_env import Sharding
from chatrlhf.sharding.checkpoint_layout import check_sharding, write_sharding
from chatrlhf.types import ScoredRollout

STAGE = "RL"
SAMPLES_A_STEP = 2
REMEDY = (
    "Lower trainer_config.actor_lr (critic_lr where the value loss is named, init_kl_coef where the KL is), or set "
    "precision to bf16 or fp32"
)
HELD = ("fingerprint", "kl", "reward_scaling", "before", "after")  # in a checkpoint's state.json, with its step


@dataclass
class PPOTrainer:
    """Everything one PPO run needs, put together by the pipeline (or by hand, as the benchmarks do).

    Random numbers are functions of seed and step, so the state of a run is: weights, optimizer, schedule, KL
    coefficient, reward scaling and the step. That is what a checkpoint holds, together with the global
    generators, which a user's reward function may draw from.
    """

    prompts: PromptSchedule
    engine: Sampler
    scorer: Scorer
    updater: Updater
    algorithm: Algorithm
    estimation: Callable[[float], Estimation]  # from the KL coefficient in force
    kl: KLController
    num_steps: int
    seed: int
    log: RunLog
    checkpoints: CheckpointStore | None = None  # None: nothing is saved
    checkpoint_steps: int = 1000
    held_out: HeldOut | None = None
    eval_interval: int | None = None
    sharding: Sharding = None  # how the updater's states are sharded
    done: Progress = field(default_factory=Progress)  # before the run is resumed
    skipped_limit: int = 3  # steps in a row that may not be taken
    guards: Guards | None = None

    before: HeldOutReport | None = None  # the held-out prompts before the first step
    after: HeldOutReport | None = None  # and at the newest evaluation

    def __post_init__(self) -> None:
        folder = self.checkpoints.folder if self.checkpoints is not None else None
        self.skipped = SkippedSteps(STAGE, folder, self.skipped_limit, self.log.warn, REMEDY)

    def train(self, checkpoint: Path | None = None) -> dict[str, float]:
        """Run all steps, or those behind a checkpoint; returns the last metrics.

        Args:
            checkpoint: which `done` was read from.

        Raises:
            Interrupted: the run was asked to stop; a checkpoint is there.
            CheckpointError: the checkpoint is of another model or of other prompts.
            RewardError: the reward gave something other than one number a response.
            StoppedByGuardError: a figure went where the configuration has it end the run.
            DivergedError: too many steps in a row had something that is not finite.
        """
        start = self.done.steps
        if checkpoint is not None:
            self._resume(checkpoint)
        reached("rl.steps", self)
        if start == 0:
            self.log.rewind(STAGE, -1)
            if self.held_out is not None:
                self.before = self.after = self._judge(self.held_out)
                self.log.step(STAGE, 0, self.before.metrics())
        with self.log.stage(STAGE, self.num_steps, start), StopRequest() as stop:
            for step in range(start, self.num_steps):
                self._step(step)
                self._checkpoint(step + 1, stop)
        return dict(self.log.last.get(STAGE, {}))

    def _judge(self, held_out: HeldOut) -> HeldOutReport:
        beat("RL: held-out prompts")
        with self.updater.backend.gathered_weights():
            return held_out.evaluate()

    def _step(self, step: int) -> None:
        """Sample, score, learn. What is not finite is not learned from."""
        clock = [time.perf_counter()]
        prompts = self.prompts.batch(step)
        rows = rollout_rows(prompts.group_ids)  # this rank's share; the scorer puts shares together
        try:
            with self.updater.backend.gathered_weights():
                beat(f"RL step {step + 1}: rollout")
                rollout = self.engine.generate(prompts, step_seed(self.seed, step, "rollout"), rows)
                clock.append(time.perf_counter())
                beat(f"RL step {step + 1}: rewards, and the models' reading of the rollout")
                scored = self.scorer.score(rollout, rows)
        except (DivergedError, NonFiniteRewardError) as error:
            if world_size() > 1:  # the others may be waiting in the middle of their part
                raise
            texts = [{"row": number, "prompt": text} for number, text in enumerate(prompts.texts, start=1)]
            self.skipped.skip(step + 1, str(error), None, texts, error)
            return
        clock.append(time.perf_counter())
        beat(f"RL step {step + 1}: update")
        coef = self.kl.coef
        experience = make_experience(scored, self.algorithm, self.estimation(coef))
        try:
            stats = self.updater.update(experience, coef, step_generator(self.seed, step, "minibatches"))
        except DivergedError as error:
            raise DivergedError(f"RL step {step + 1}: {error}. {REMEDY}, then use --resume") from None
        clock.append(time.perf_counter())
        self._keep_skipped(step + 1, scored, whole=not stats)
        if stats and math.isfinite(scored.kl_to_reference):
            self.kl.update(scored.kl_to_reference, len(scored.rollout))
        if experience.returns is not None and scored.values is not None:
            explained = explained_variance(scored.values, experience.returns, experience.response_mask)
            stats |= {"ppo/explained_variance": explained} if explained is not None else {}
        self._record(step + 1, scored, stats, coef, clock)

    def _keep_skipped(self, step: int, scored: ScoredRollout, whole: bool) -> None:
        """Say and keep which minibatches were not learned from; ``whole``: there was no other."""
        not_taken = self.updater.not_taken
        if not whole:
            self.skipped.taken()
        if not not_taken:
            return
        rollout = scored.rollout
        rows = [
            {"row": row + 1, "prompt": text, "completion": completion, "score": float(score)}
            for row, text, completion, score in (
                (row, rollout.prompts.texts[row], rollout.completions[row], scored.raw_scores[row])
                for row in sorted({row for each in not_taken for row in each.rows})
            )
        ]
        self.skipped.skip(step, not_taken[0].why, not_taken[0].where, rows, counts=whole)

    def _record(
        self, step: int, scored: ScoredRollout, stats: dict[str, float], coef: float, clock: list[float]
    ) -> None:
        reached("rl.step", step)
        rollout = scored.rollout
        lengths, tokens = rollout.lengths.float(), int(rollout.lengths.sum())
        gap, largest_gap = logprob_gap(scored.old_logprobs, rollout.sampling_logprobs, rollout.response_mask)
        kl = kl_of_replies(scored.old_logprobs, scored.ref_logprobs, rollout.response_mask)
        rollout_s, score_s, update_s = (b - a for a, b in zip(clock, clock[1:], strict=False))
        metrics: dict[str, Any] = {
            "reward/mean": float(scored.raw_scores.double().mean()),
            "reward/std": float(scored.raw_scores.double().std(correction=0)),
            "reward/shaped": float(scored.scores.mean()),
            "kl/ref": kl,
            "kl/ref_k1": scored.kl_to_reference,
            "kl/token": kl * len(rollout) / max(tokens, 1),
            "kl/coef": coef,
            **stats,
            "ppo/entropy": scored.entropy,
            "sampling/logprob_gap": gap,
            "sampling/logprob_gap_max": largest_gap,
            "response/length": float(lengths.mean()),
            "response/finished": float(rollout.finished.float().mean()),
            "response/distinct_2": distinct_ngrams(rollout.response_ids, rollout.response_mask),
            "response/repetition": repeated_ngrams(rollout.response_ids, rollout.response_mask),
            "lr/actor": self.updater.backend.optimizer.param_groups[0]["lr"],
            "guard/skipped_minibatches": len(self.updater.not_taken),
            "episodes": self.progress(step).episodes,
            "time/rollout": rollout_s,
            "time/score": score_s,
            "time/update": update_s,
            "tokens/s": tokens / (rollout_s + score_s + update_s),
        }
        last = step == self.num_steps
        due = last or (self.eval_interval is not None and step % self.eval_interval == 0)
        if self.held_out is not None and due:
            self.after = self._judge(self.held_out)
            metrics |= self.after.metrics() | self._forgotten()
        if self.guards is not None:
            metrics |= self.guards.look(step, metrics)
        self.log.step(STAGE, step, metrics)
        self.log.samples(
            STAGE,
            step,
            [
                {"prompt": prompt, "completion": completion, "score": float(score)}
                for prompt, completion, score in zip(
                    rollout.prompts.texts[:SAMPLES_A_STEP],
                    rollout.completions[:SAMPLES_A_STEP],
                    scored.raw_scores[:SAMPLES_A_STEP],
                    strict=True,
                )
            ],
        )

    def _forgotten(self) -> dict[str, float]:
        """By how much held-out demonstrations have become less likely while the reward rose."""
        before, after = self.before, self.after
        if before is None or after is None or before.demonstration_loss is None or after.demonstration_loss is None:
            return {}
        rise = max(after.demonstration_loss - before.demonstration_loss, 0.0)
        return {"eval/forgotten": rise if after.reward > before.reward else 0.0}

    def _checkpoint(self, step: int, stop: StopRequest) -> None:
        request = stop.any_rank_stopped()
        stopped = self.guards.stopped if self.guards is not None else None
        if self.checkpoints is None:
            if request is not None:
                raise Interrupted(request)
            if stopped:
                raise StoppedByGuardError(stopped)
            return
        if request is not None or stopped or step % self.checkpoint_steps == 0 or step == self.num_steps:
            generators = gather_objects(generator_states())
            self._require_finite(step)
            path = self.checkpoints.publish(
                step, lambda folder: self._write(folder, step, generators), self.updater.backend.save_shards
            )
            if stopped:
                raise StoppedByGuardError(f"{stopped}. A checkpoint of this step is there: {path}")
            if request is not None and step < self.num_steps:
                raise Interrupted(request, f"continue with --resume (checkpoint {path})")

    def _require_finite(self, step: int) -> None:
        backend = self.updater.backend
        require_finite(
            f"{STAGE} step {step}",
            chain(trained(self.updater.actor_critic), moments(backend.optimizer)),
            f"the checkpoint before stays; {REMEDY[0].lower()}{REMEDY[1:]}, then use --resume",
        )

    def _write(self, folder: Path, step: int, generators: list[dict[str, Any]]) -> None:
        self.updater.backend.save_weights(folder)
        reached("rl.weights_saved", folder)
        write_sharding(folder, self.sharding)
        torch.save(self.updater.backend.state_dict() | {"generators": generators}, folder / "training.pt")
        state = {
            "step": step,
            "progress": self.progress(step).state_dict(),
            "prompts_of_an_epoch": self.prompts.seen.size,
            "fingerprint": self.updater.backend.fingerprint,
            "kl": self.kl.state_dict(),
            "reward_scaling": self.scorer.scaling.state_dict(),
            "skipped": self.skipped.state_dict(),
            "guards": self.guards.state_dict() if self.guards is not None else None,
            "before": self.before.state_dict() if self.before else None,
            "after": self.after.state_dict() if self.after else None,
        }
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def progress(self, step: int) -> Progress:
        """What is done after so many steps."""
        prompts, settings = self.prompts, self.updater.settings
        rollouts = prompts.prompts_per_step * prompts.samples_per_prompt
        minibatches = settings.epochs * (rollouts // settings.batch_size)
        return self.done.after(step - self.done.steps, rollouts, prompts.samples_per_prompt, minibatches)

    def _resume(self, folder: Path) -> None:
        """Take up a checkpoint."""
        with doing("RL: reading the checkpoint", folder, untrusted=True):
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if missing := [name for name in HELD if name not in state]:
                raise KeyError(f"{STATE} lacks {', '.join(missing)}")
        if state["fingerprint"] != self.updater.backend.fingerprint:
            raise CheckpointError(
                f"{folder}: it is a checkpoint of another model (other parameters, or others in training, than this "
                "configuration's); set models, critic_config and num_layers_unfrozen back, or use another output_dir"
            )
        if (prompts := state.get("prompts_of_an_epoch", self.prompts.seen.size)) != self.prompts.seen.size:
            raise CheckpointError(
                f"{folder}: an epoch had {prompts:,} prompts and now has {self.prompts.seen.size:,}; restore the data "
                "and the keys that select prompts, or start again without --resume"
            )
        check_sharding(folder, self.sharding)
        self.updater.backend.load_weights(folder)
        with doing("RL: reading the checkpoint", folder, untrusted=True):
            tensors = torch.load(folder / "training.pt", weights_only=True)
        self.updater.backend.load_state_dict(tensors)
        self.kl.load_state_dict(state["kl"])
        self.scorer.scaling.load_state_dict(state["reward_scaling"])
        if rank() < len(tensors["generators"]):  # a rank that was not there before starts its generators afresh
            set_generator_states(tensors["generators"][rank()])
        if "skipped" in state:  # not of earlier versions
            self.skipped.load_state_dict(state["skipped"])
        if self.guards is not None and state.get("guards") is not None:
            self.guards.load_state_dict(state["guards"])
        self.before = HeldOutReport(**state["before"]) if state["before"] else None
        self.after = HeldOutReport(**state["after"]) if state["after"] else None
        step = self.done.steps
        self.log.rewind(STAGE, step)
        self.log.note(f"{STAGE}: resumed from {folder} (step {step} of {self.num_steps})")
        if step == self.num_steps:
            self.log.note(f"{STAGE}: its {self.done.episodes} episodes were made before, there is nothing left to do")
