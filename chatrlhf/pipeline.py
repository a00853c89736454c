"""A run: what is checked first, its stages, what they left. `ALL` is nothing but a loop over them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from chatrlhf.config.on_resume import flat
from chatrlhf.config.schema import STAGES, Config
from chatrlhf.data.inputs import Inputs, read_inputs
from chatrlhf.errors import ConfigError, Interrupted, OutsideError, WeightsError
from chatrlhf.errors.boundary import doing
from chatrlhf.models.classifier import LazyClassifier, is_used_as_it_is
from chatrlhf.preflight import preflight
from chatrlhf.rl.rewards import DialogueReward, FunctionReward, RewardFunction, resolve_reward_fn
from chatrlhf.runtime.collectives import gather_results, is_main, rank, start, world_size
from chatrlhf.runtime.device import pick_device
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.manifest import FILE_NAME, Manifest
from chatrlhf.runtime.output_dir import TRIES, check_output_dir, key_of_folder
from chatrlhf.runtime.run_lock import RunLock
from chatrlhf.runtime.run_log import METRICS, RunLog, quiet_libraries
from chatrlhf.runtime.signals import limited, listening, stop_if_asked
from chatrlhf.runtime.start_room import check_start
from chatrlhf.runtime.watchdog import beat, watched
from chatrlhf.runtime.whole_folders import RECORDED, require_whole
from chatrlhf.sharding.launch import sharding_of
from chatrlhf.stages.context import RunContext
from chatrlhf.stages.readiness import check_readiness
from chatrlhf.stages.resume import Resumption
from chatrlhf.stages.sources import Sources
from chatrlhf.stages.trained_weights import trained_weights

# Imported when their stage runs: transformers' Trainer and what it brings take seconds.
STAGE_FUNCTIONS = {
    "PRETRAIN": "chatrlhf.stages.pretrain:run_pretrain",
    "ACTOR": "chatrlhf.stages.sft:run_actor",
    "REWARD": "chatrlhf.stages.reward:run_reward",
    "RL": "chatrlhf.stages.rl:run_rl",
}
DAY = "day"  # of the run's start, which templates show that ask for the date; a fact of the manifest


class Metrics(dict[str, float]):
    """The last value of each metric of a stage; ``path`` is the run's `metrics.jsonl`."""

    def __init__(self, values: dict[str, float], path: Path) -> None:
        super().__init__(values)
        self.path = path


@dataclass
class StageResult:
    """What a stage left behind."""

    checkpoint: Path  # folder that transformers' Auto classes load
    metrics: Metrics


@dataclass
class RunResult:
    """What a run left behind, by stage."""

    output_dir: Path
    stages: dict[str, StageResult]


def run(
    config: Config,
    type: str = "ALL",
    reward_fn: RewardFunction | None = None,
    resume: bool = False,
    time_limit: float | None = None,
    day: date | None = None,
) -> RunResult:
    """Train one stage or all of them.

    Args:
        config: from `load_config`.
        type: ALL, PRETRAIN, ACTOR, REWARD or RL.
        reward_fn: ``(prompts, completions) -> one float each``; no reward model is needed then.
        resume: go on with the run in the output folder from its newest checkpoints.
        time_limit: seconds from now within which the run stops by itself; --resume continues with it.
        day: that templates show which ask for the date; None: today, or of a resumed run the day it had.

    Raises:
        UserError: one line that says what was received, what was expected and what to change; an OutsideError, whose
            cause is what a library has raised, where a file, a disk or memory failed.
        Interrupted: a signal, a closed output or the time limit; what was done before is there.
    """
    if type not in ("ALL", *STAGES):
        raise ConfigError(f"type: expected ALL, {', '.join(STAGES)}, got {type!r}")
    lock = RunLock(config.run_dir, key_of_folder(config))
    try:
        with listening(), limited(time_limit), doing("the run in", config.run_dir):
            return _run(config, type, reward_fn, resume, lock, day)
    except Interrupted as stopped:
        raise stopped.or_else("no stage had begun; start it again") from None
    except OutsideError as error:
        error.run_dir = config.run_dir
        raise
    finally:
        lock.release()


def _run(
    config: Config, type: str, reward_fn: RewardFunction | None, resume: bool, lock: RunLock, day: date | None
) -> RunResult:
    start()
    stages = config.stages(type)
    # Checks come first: nothing is written before everything that will be read has been read once.
    reward = reward_function(config, reward_fn, stages)
    gather_results(lambda: _claim(config, lock) if is_main() else None)
    if not resume:  # what a resumed run writes may take the place of what is there
        gather_results(lambda: _check_start(config, stages, reward is not None) if is_main() else None)
    manifest = Manifest.open(config.run_dir, resume)
    config.fix_day(date.fromisoformat(manifest.facts[DAY]) if DAY in manifest.facts else day or date.today())
    inputs = read_inputs(config, stages, needs_judgements=reward is None)
    quiet_libraries()
    preflight(config, stages, inputs, reward is not None, config.run_dir)
    _try_reward(reward, inputs, stages)
    if isinstance(reward, DialogueReward) and inputs.prompts is not None:
        reward.function.check([*inputs.prompts.train, *inputs.prompts.held_out])
    sources = Sources(config, manifest, inputs, reward, RunLog(config.run_dir).note)
    resumption = _resumption(sources, stages) if resume else None
    gather_results(lambda: _require_results(sources, stages, resumption) if is_main() else None)
    differences = resumption.check() if resumption else []
    gather_results(lambda: _claim_for_writing(manifest, lock) if is_main() else None)
    manifest.begin(config, stages, reward.name if reward_fn is not None and reward is not None else None)
    manifest.fact(DAY, config.day.isoformat)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    log = RunLog(config.run_dir, config.trackers, config.model_dump(mode="json"))
    for note in config.notes:
        log.note(f"note: {note}")
    for note in inputs.notes:
        log.note(note)
    for warning in inputs.warnings:
        log.warn(warning)
    for line in differences:
        log.warn(line)
    trained = [stage for stage in stages if stage != "REWARD" or reward is None]
    ctx = RunContext(config, inputs, log, manifest, pick_device(), reward, resume, trained)
    results: dict[str, StageResult] = {}
    watch = watched(config.run_dir, config.guards_config.silence, rank())
    try:
        with watch:
            _run_stages(ctx, stages, resumption, results)
    except Interrupted as stopped:
        raise stopped.or_else("no step was being made; continue with --resume") from None
    finally:
        log.close()
    return RunResult(config.run_dir, results)


def _run_stages(
    ctx: RunContext, stages: list[str], resumption: Resumption | None, results: dict[str, StageResult]
) -> None:
    for stage in stages:
        if stage == "REWARD" and ctx.reward is not None:
            ctx.log.note(f"REWARD: skipped, the reward is {ctx.reward.name}")
            continue
        check_readiness(ctx, stage)
        results[stage] = _run_stage(ctx, stage, resumption)
        gc.collect()
        if stage != ctx.stages[-1]:
            stop_if_asked(f"{stage} is finished; continue with --resume")


def _claim(config: Config, lock: RunLock) -> None:
    """See that the run's folder can be written to; if it is there, lock it and finish what a kill left half moved."""
    check_output_dir(config)
    if config.run_dir.is_dir():
        lock.acquire()
        if (config.run_dir / FILE_NAME).exists():
            Manifest.open(config.run_dir, resume=True).finish_moves()


def _check_start(config: Config, stages: list[str], has_reward_fn: bool) -> None:
    """See that the disk has room for what the run will leave."""
    weights = trained_weights(config, stages, has_reward_fn)
    sections = (config.actor_config, config.reward_config)
    is_sharded = world_size() > 1 or any(section.deepspeed_enable for section in sections)
    if weights:
        check_start(config.run_dir, key_of_folder(config), weights, is_sharded)


def _claim_for_writing(manifest: Manifest, lock: RunLock) -> None:
    """Make the run's folder and lock it, where that was not done at the start."""
    if not lock.is_held:
        for _ in range(TRIES):
            manifest.run_dir.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # another start that only tried the folder has removed it again
                lock.acquire()
                break
        else:
            lock.acquire()
        manifest.refuse_changes()


def _resumption(sources: Sources, stages: list[str]) -> Resumption:
    """What --resume is asked to continue."""
    config, settings = sources.config, flat(sources.config.model_dump(mode="json"))
    stages = [stage for stage in stages if stage != "REWARD" or sources.reward is None]
    sharded = frozenset(stage for stage in stages if sharding_of(config, stage) is not None)
    return Resumption(sources.manifest, settings, stages, sources.made_from, sources.starts_from, sharded)


def _require_results(sources: Sources, stages: list[str], resumption: Resumption | None) -> None:
    """See that what earlier stages have left is whole, where this run keeps it or starts from it."""
    manifest = sources.manifest
    for stage in stages:
        is_kept = resumption is not None and resumption.is_kept(stage)
        needed = (stage,) if is_kept else [each for each in sources.starts_from(stage) if each not in stages]
        for each in filter(manifest.is_done, needed):
            for name in manifest.stages[each].get(RECORDED, {}):
                if not (place := manifest.run_dir / name).is_dir():
                    raise WeightsError(
                        f"{place} is missing, and {FILE_NAME} says that {each} has left it. Restore it from a copy, or "
                        f"train it again with --type {each}"
                    )
                require_whole(place)


def _run_stage(ctx: RunContext, stage: str, resumption: Resumption | None) -> StageResult:
    """One stage, unless a resumed run has finished it already and asks for no more of it."""
    if resumption is not None and resumption.is_kept(stage):
        ctx.log.note(f"{stage}: finished before, nothing is left to do, kept")
    else:
        if resumption is not None and resumption.is_extended(stage):
            ctx.log.note(f"{stage}: finished before, and asked for more: it continues from its last checkpoint")
        # Imported here, or the libraries behind it would speak before they were told to be quiet.
        from transformers import set_seed

        # Python's and NumPy's generators too: a user's reward function may draw from them, and what it draws must not
        # depend on which stages ran earlier in this process.
        set_seed(ctx.seed(stage))
        reached("run.stage", stage)
        beat(f"{stage}: reading models and data")
        with doing(stage):
            record = _stage_function(stage)(ctx)
            ctx.manifest.finish(stage, record)
    done = ctx.manifest.stages[stage]
    return StageResult(ctx.dir / done["output"], Metrics(done["metrics"], ctx.dir / METRICS))


def _stage_function(stage: str) -> Callable[[RunContext], dict[str, Any]]:
    module, _, name = STAGE_FUNCTIONS[stage].partition(":")
    return getattr(import_module(module), name)


def _try_reward(reward: FunctionReward | None, inputs: Inputs, stages: list[str]) -> None:
    """See what a user's function gives before models are read; a classifier's weights are not read for that."""
    if reward is None or isinstance(reward, DialogueReward) or "RL" not in stages:
        return
    prompts = [prompt.text for prompt in inputs.prompts.train[:2]] if inputs.prompts is not None else []
    gather_results(lambda: reward.try_out(prompts) if is_main() else None)


def reward_function(config: Config, reward_fn: Callable[..., Any] | None, stages: list[str]) -> FunctionReward | None:
    """What scores texts where no reward model of this package does."""
    keys = config.reward_config
    if reward_fn is not None:
        return FunctionReward(reward_fn, getattr(reward_fn, "__name__", "reward_fn"), keys.reward_timeout)
    if keys.reward_fn is not None:
        return resolve_reward_fn(keys.reward_fn, keys.reward_timeout)
    if is_used_as_it_is(keys, stages, config.run_dir / "reward"):
        return DialogueReward(LazyClassifier(keys), str(keys.model))
    return None
