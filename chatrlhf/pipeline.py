"""The stages and what they hand over. `ALL` is nothing but a loop over the same functions."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatrlhf.assembly import assemble_ppo, sampling_distribution
from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import STAGES, ActorConfig, Config
from chatrlhf.data.collate import Encoder
from chatrlhf.data.inputs import Inputs, Rows, corpus, read_inputs
from chatrlhf.data.templates import get_template
from chatrlhf.device import pick_device, resolve_rl_precision
from chatrlhf.distributed import broadcast, rank, start
from chatrlhf.errors import ConfigError
from chatrlhf.evaluation.table import show_comparison
from chatrlhf.manifest import Manifest
from chatrlhf.models.adapter_scaling import scaling_warning
from chatrlhf.models.adapters import add_adapters, base_of, has_adapters, save_model, train_on_adapters, where
from chatrlhf.models.classifier import LazyClassifier, is_used_as_it_is
from chatrlhf.models.critics import make_topology
from chatrlhf.models.factory import (
    context_length,
    encoder_class,
    load_actor,
    load_base,
    load_policy,
    new_reward_model,
    parameter_count,
    trained_count,
    trained_reward_model,
)
from chatrlhf.models.quantization import ready_for_adapters
from chatrlhf.models.reward_model import scorer_of_critic
from chatrlhf.models.sharing import Base, share_weights
from chatrlhf.preflight import preflight
from chatrlhf.pretraining import run_pretrain, with_fresh_adapters
from chatrlhf.progress import METRICS, RunLog, quiet_libraries
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.prompts import step_seed
from chatrlhf.rl.rewards import (
    FunctionReward,
    ModelReward,
    RewardFunction,
    RewardSource,
    resolve_reward_fn,
)
from chatrlhf.sharding.environment import Sharding, deals_out_weights, environment_for
from chatrlhf.trainers.checkpoint import CheckpointStore, StageFiles, publish_folder
from chatrlhf.trainers.launch import sharding_of


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


@dataclass
class Run:
    """What all stages of one run share."""

    config: Config
    inputs: Inputs
    log: RunLog
    manifest: Manifest
    device: torch.device
    reward: FunctionReward | None  # takes the reward model's place
    resume: bool

    @property
    def dir(self) -> Path:
        return self.manifest.run_dir

    def files(self, stage: str, keep: int) -> StageFiles:
        """Where a stage keeps its checkpoints."""
        checkpoints = self.dir / "checkpoints"
        store = CheckpointStore(checkpoints / stage, keep, self.log.warn)
        scratch = checkpoints / f".scratch-{stage}"
        return StageFiles(stage, store, scratch, self.resume, lambda: self.manifest.set_aside(stage, self.log.note))

    def seed(self, stage: str) -> int:
        return step_seed(self.config.seed, 0, stage) % 2**31

    def trained(self, stage: str, folder: str, model: str | None) -> Path | None:
        """Folder of a stage's result, if it is there and was made from ``model``."""
        made_from = self.manifest.stages.get(stage, {}).get("model")
        return self.dir / folder if made_from == model and (self.dir / folder).exists() else None

    def start(self) -> ActorConfig:
        """The actor's settings with the model that it starts from: what PRETRAIN has left, or what they name."""
        settings = self.config.actor_config
        folder = self.trained("PRETRAIN", "pretrained", settings.model)
        if folder is None:
            return settings
        # Its tokenizer lies beside it; of what adapters belong to the revision goes on to matter.
        revision = settings.revision if base_of(str(folder)) is not None else None
        return settings.model_copy(update={"model": str(folder), "tokenizer_path": None, "revision": revision})

    def start_name(self) -> str:
        """Of `start`, for people."""
        return "actor_config.model" if self.start() is self.config.actor_config else "the pretrained model"

    def warn_of_scaling(self, model: str, heeded: bool = True) -> None:
        """Where adapters are about to meet other rotary positions than they were trained with."""
        warning = scaling_warning(model, self.config.actor_config.rope_scaling, heeded)
        if warning is not None:
            self.log.warn(warning)


def run(
    config: Config,
    type: str = "ALL",
    reward_fn: RewardFunction | None = None,
    resume: bool = False,
) -> RunResult:
    """Train one stage or all of them.

    Args:
        config: from `load_config`.
        type: ALL, PRETRAIN, ACTOR, REWARD or RL.
        reward_fn: ``(prompts, completions) -> one float each``; no reward model is needed then.
        resume: go on with the run in the output folder from its newest checkpoints.

    Raises:
        UserError: one line that says what was received, what was expected and what to change.
        Interrupted: SIGTERM or Ctrl-C; a valid checkpoint is there.
    """
    if type not in ("ALL", *STAGES):
        raise ConfigError(f"type: expected ALL, {', '.join(STAGES)}, got {type!r}")
    start()
    stages = config.stages(type)
    # Checks come first: nothing is written before everything that will be read has been read once.
    reward = _reward_function(config, reward_fn, stages)
    inputs = read_inputs(config, stages, needs_judgements=reward is None)
    quiet_libraries()
    preflight(config, stages, inputs, reward is not None, config.run_dir)
    manifest = Manifest.open(config.run_dir, resume)
    changed = manifest.begin(config, stages)
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    log = RunLog(config.run_dir, config.trackers, config.model_dump(mode="json"))
    for note in config.notes:
        log.note(f"note: {note}")
    for note in inputs.notes:
        log.note(note)
    for warning in inputs.warnings:
        log.warn(warning)
    if resume and changed:
        log.warn("settings differ from the run that is resumed: " + "; ".join(changed))
    this = Run(config, inputs, log, manifest, pick_device(), reward, resume)
    results: dict[str, StageResult] = {}
    try:
        for stage in stages:
            if stage == "REWARD" and reward is not None:
                log.note(f"REWARD: skipped, the reward is {reward.name}")
                continue
            results[stage] = _run_stage(this, stage)
            gc.collect()
    finally:
        log.close()
    return RunResult(config.run_dir, results)


def _run_stage(this: Run, stage: str) -> StageResult:
    """One stage, unless a resumed run has finished it already."""
    if this.resume and this.manifest.is_done(stage):
        this.log.note(f"{stage}: finished before, kept")
    else:
        # Imported here, or the libraries behind it would speak before they were told to be quiet.
        from transformers import set_seed

        # Python's and NumPy's generators too: a user's reward function may draw from them, and what it draws must not
        # depend on which stages ran earlier in this process.
        set_seed(this.seed(stage))
        record = {"PRETRAIN": run_pretrain, "ACTOR": run_actor, "REWARD": run_reward, "RL": run_rl}[stage](this)
        this.manifest.finish(stage, record)
    done = this.manifest.stages[stage]
    return StageResult(this.dir / done["output"], Metrics(done["metrics"], this.dir / METRICS))


def run_actor(this: Run) -> dict[str, Any]:
    """ACTOR: fine-tune the language model on demonstrations; leaves ``actor/``."""
    from chatrlhf.trainers.sft import train_actor

    config, rows = this.config.actor_config, _given(this.inputs.actor)
    start = this.start()
    if start is config and this.config.pretrain_config.names_data:
        this.log.warn("ACTOR: no pretrained model in this folder, so it starts from actor_config.model as it is")
    this.warn_of_scaling(start.model)
    goes_on = config.peft_enable and start is not config and base_of(start.model) is not None
    load = load_base if goes_on else load_actor
    model, tokenizer = load(start, corpus(this.config), this.device, config.precision)
    encoder = _encoder(this.config, model, tokenizer)
    this.log.note(
        f"ACTOR: {start.model}, {parameter_count(model):,} parameters, {rows.epochs.size} rows, "
        f"{len(rows.held_out)} held out"
    )
    if goes_on:
        model = train_on_adapters(ready_for_adapters(model, config.gradient_checkpointing), start.model)
        this.log.note(f"ACTOR: goes on with the adapters of PRETRAIN, {trained_count(model):,} parameters")
    else:
        model = with_fresh_adapters(this, model, start, "ACTOR", config.gradient_checkpointing)
    files, seed = this.files("ACTOR", config.n_checkpoints_to_keep), this.seed("ACTOR")
    sharding = sharding_of(this.config, "ACTOR")
    model = train_actor(model, encoder, rows, config, files, this.log, this.device, seed, sharding)
    _publish_policy(this.dir / "actor", model, encoder)
    return _record(this, "ACTOR", "actor", config.model, rows)


def run_reward(this: Run) -> dict[str, Any]:
    """REWARD: train a model to score completions; leaves ``reward/``."""
    from chatrlhf.trainers.reward import loss_for, train_reward_model

    config, rows = this.config.reward_config, _given(this.inputs.reward)
    actor = this.trained("ACTOR", "actor", this.config.actor_config.model)
    if config.model == "actor" and actor is None:
        this.log.warn(f"REWARD: no fine-tuned actor here, so the reward model starts from {this.start_name()} as it is")
    elif config.model == "actor":
        this.warn_of_scaling(str(actor), heeded=False)
    adapters = load_peft_config(this.config, "reward_config") if config.peft_enable else None
    whole = this.config.model_copy(update={"actor_config": this.start()})
    scorer = new_reward_model(whole, actor, corpus(this.config), this.device, adapters)
    this.log.note(
        f"REWARD: {config.model}, {parameter_count(scorer.model):,} parameters, {loss_for(rows.train, config)} on "
        f"{rows.epochs.size} rows, {len(rows.held_out)} held out"
    )
    if adapters is not None:
        this.log.note(f"REWARD: trains adapters and a head alone, {trained_count(scorer.model):,} parameters")
    files, seed = this.files("REWARD", config.n_checkpoints_to_keep), this.seed("REWARD")
    sharding = sharding_of(this.config, "REWARD")
    train_reward_model(scorer, rows, config, files, this.log, this.device, seed, sharding)
    publish_folder(this.dir / "reward", scorer.save)
    return _record(this, "REWARD", "reward", config.model, rows)


def run_rl(this: Run) -> dict[str, Any]:
    """RL: improve the actor against the reward; leaves ``actor_rl/`` and ``critic/``."""
    sharding = sharding_of(this.config, "RL")
    with environment_for(sharding):
        return _run_rl(this, sharding)


def _run_rl(this: Run, sharding: Sharding) -> dict[str, Any]:
    config, trainer_config, rows = this.config, this.config.trainer_config, _given(this.inputs.prompts)
    # What will be dealt out need not fit on one device first.
    place = torch.device("cpu") if deals_out_weights(sharding) else this.device
    policy, encoder, base = _starting_policy(this, place)
    upon = Base(policy, base) if has_adapters(policy) else None
    reward_scorer = (
        None if this.reward else trained_reward_model(this.dir / "reward", config.reward_config, this.device, upon)
    )
    reward: RewardSource = this.reward or ModelReward(reward_scorer, encoder)
    distribution = sampling_distribution(config, encoder)
    algorithm = ALGORITHMS[trainer_config.algorithm]
    topology, critic_line = make_topology(
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
    topology.to(place)
    if upon is not None:
        critic_line += "; the policy is trained by adapters, its reference stands upon the same weights"
    if upon is not None and reward_scorer is not None and share_weights(policy, reward_scorer.model):
        critic_line += ", and so does the reward model"
    broadcast(topology.parameters())
    reference = topology.reference()
    this.log.note(f"RL: {trainer_config.algorithm}, {trained_count(topology):,} parameters in training; {critic_line}")
    files = this.files("RL", trainer_config.n_checkpoints_to_keep)
    trainer = assemble_ppo(
        config, topology, reference, encoder, reward, rows, this.device, this.log, files.store, sharding
    )
    files.begin()
    if rank() > 0:
        from transformers import set_seed

        # Everything is made; from here on a reward function that draws random numbers draws others on each rank.
        set_seed(this.seed("RL") + rank())
    trainer.train(this.resume)
    with trainer.updater.full_precision():
        _publish_policy(this.dir / "actor_rl", policy, encoder)
        if (critic := topology.value_function()) is not None:
            # In the reward model's file format: its score of a text is V behind the text's last token.
            publish_folder(this.dir / "critic", scorer_of_critic(*critic, encoder).save)
    trainer.updater.close()
    if trainer.before is not None and trainer.after is not None:
        show_comparison(this.log.console, trainer.before, trainer.after, trainer_config.eval_best)
    return _record(this, "RL", "actor_rl", config.actor_config.model, rows)


def _starting_policy(this: Run, device: torch.device) -> tuple[torch.nn.Module, Encoder, str]:
    """The fine-tuned actor, or the model that the configuration names, where no ACTOR stage has run.

    Returns:
        The policy, with the adapters that it is trained by; its encoder; where its weights are, or those that its
        adapters stand upon.
    """
    settings = this.config.actor_config
    precision = resolve_rl_precision(this.config.trainer_config.precision, this.device)
    folder = this.trained("ACTOR", "actor", settings.model)
    apart = settings.peft_enable
    if folder is not None:
        this.warn_of_scaling(str(folder), heeded=False)
    else:
        settings = this.start()
        this.warn_of_scaling(settings.model, heeded=not apart)
        this.log.warn(f"RL: no fine-tuned actor in this folder, so the policy starts from {this.start_name()} as it is")
        torch.manual_seed(this.seed("RL"))  # a resumed run's policy and reference start from the same random weights
        if apart and base_of(settings.model) is not None:
            folder = Path(settings.model)
    template = None
    if folder is not None:
        model, tokenizer, template = load_policy(folder, device, apart, settings, precision)
        place = base_of(str(folder)) or where(str(folder))
    else:
        model, tokenizer = load_actor(settings, corpus(this.config), device, precision)
        place = where(settings.model)
    if apart and not has_adapters(model):
        model = ready_for_adapters(model)
        add_adapters(model, load_peft_config(this.config), place, settings.revision)
    return model, _encoder(this.config, model, tokenizer, template), place


def _encoder(config: Config, model: torch.nn.Module, tokenizer: Any, template: Any = None) -> Encoder:
    limit = min(config.actor_config.max_sequence_length, context_length(model))
    template = template or get_template(config.actor_config.template, tokenizer=tokenizer, folder=config.base_dir)
    return encoder_class(model.config).of(tokenizer, template, limit)


def _publish_policy(target: Path, model: torch.nn.Module, encoder: Encoder) -> None:
    def write(folder: Path) -> None:
        save_model(model, folder)
        encoder.save(folder)

    publish_folder(target, write)


def _record(this: Run, stage: str, output: str, model: str | None, rows: Rows) -> dict[str, Any]:
    return {
        "model": model,
        "inputs": rows.files,
        "rows": {"train": rows.epochs.size, "held_out": len(rows.held_out)},
        "output": output,
        "metrics": this.log.last.get(stage, {}),
    }


def _reward_function(config: Config, reward_fn: Callable[..., Any] | None, stages: list[str]) -> FunctionReward | None:
    """What scores texts where no reward model of this package does."""
    keys = config.reward_config
    if reward_fn is not None:
        return FunctionReward(reward_fn, getattr(reward_fn, "__name__", "reward_fn"))
    if keys.reward_fn is not None:
        return resolve_reward_fn(keys.reward_fn)
    if is_used_as_it_is(keys, stages, config.run_dir / "reward"):
        return FunctionReward(LazyClassifier(keys), str(keys.model))
    return None


def _given(rows: Rows | None) -> Rows:
    assert rows is not None, "a stage runs only after its inputs were read"
    return rows
