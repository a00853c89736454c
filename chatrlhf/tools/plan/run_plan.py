"""The plan of a run: each stage's parameters, memory, steps, tokens and time on given hardware."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from chatrlhf.config.schema import ActorConfig, Config, RewardConfig
from chatrlhf.data.inputs import Inputs, Rows
from chatrlhf.data.stage_rows import Preference
from chatrlhf.errors import MissingError
from chatrlhf.models.classifier import is_used_as_it_is
from chatrlhf.models.loading.rope import positions
from chatrlhf.preflight import check_rows, check_settings
from chatrlhf.runtime.collectives import world_size
from chatrlhf.sharding.launch import microbatching
from chatrlhf.stages.hf_trainer import eval_batch_size
from chatrlhf.tools.plan.data_counts import Assumed, Counted, Sides, count, encoder_if_there, read_what_is_there
from chatrlhf.tools.plan.fake_run import FakeDevice, raises_if_unplannable
from chatrlhf.tools.plan.flops import decoding_seconds, seconds, training_forwards
from chatrlhf.tools.plan.hardware import Hardware, this_machine
from chatrlhf.tools.plan.meta_models import Models
from chatrlhf.tools.plan.published_shapes import has_shape
from chatrlhf.tools.plan.rl_memory import CRITIC, REWARD, RolloutBatch, rollout_batch
from chatrlhf.tools.plan.rl_stage import rl_stage
from chatrlhf.tools.plan.sft_reward_memory import Batch, Phase, StagePlan, actor_stage, reward_stage
from chatrlhf.tools.plan.zero_memory import Sharding, sharding_of

# What a process needs beside its tensors, which a plan cannot see: on a GPU its context, libraries and what lies idle
# between tensors; on a CPU the threads' buffers and compiled products.
BESIDE = {"cuda": ("context and libraries", 1 << 30), "cpu": ("process", 150 << 20)}
SECTION = {"ACTOR": "actor_config", "REWARD": "reward_config", "RL": "actor_config"}


@dataclass
class Planned:
    """A stage of a run."""

    name: str
    made: StagePlan
    sharding: Sharding
    counted: Counted
    batch: Batch | RolloutBatch
    steps: int | None  # optimizer steps; of RL, rollout batches
    tokens: float | None  # that are trained on; of RL, that are sampled
    seconds: float | None

    @property
    def phases(self) -> list[Phase]:
        return self.made.phases

    @property
    def most(self) -> Phase:
        """The phase that needs the most of a device's memory."""
        return max(self.phases, key=lambda phase: phase.total)


@dataclass
class RunPlan:
    """What a run will do and need."""

    hardware: Hardware
    stages: list[Planned]
    inputs: Inputs
    notes: list[str] = field(default_factory=list)  # what was taken for granted

    @property
    def fits(self) -> bool:
        return all(each.most.total <= self.hardware.device.memory for each in self.stages)


def plan_run(
    config: Config,
    stages: list[str],
    hardware: Hardware | None = None,
    assumed: Assumed | None = None,
    run_dir: Path | None = None,
) -> RunPlan:
    """Plan the stages of a run.

    Args:
        hardware: None: this machine, and the processes of this launch.
        assumed: rows and tokens where the data are not here, or in their place.

    Raises:
        ConfigError, DataError: the run would refuse to start, for another reason than that something is not here.
    """
    assumed = assumed or Assumed({}, {})
    where = hardware or replace(this_machine(), count=world_size())
    has_function = config.reward_config.reward_fn is not None
    given = has_function or _is_used_as_it_is(config, stages, (run_dir or config.run_dir) / "reward")
    inputs, missing = read_what_is_there(config, stages, needs_judgements=not given)
    models = Models(config, FakeDevice(where.device.type, where.device.bf16))
    check_settings(
        config, stages, given, run_dir or config.run_dir, models.settings, hardware.count if hardware else None
    )
    notes = [f"{reason}; the plan continues without" for reason in missing.values()]
    encoder, no_tokenizer = encoder_if_there(config, 1 << 30)
    if no_tokenizer:
        notes.append(f"{no_tokenizer}; the plan takes every row to be as long as the context, or as --tokens says")
    else:
        check_rows(config, stages, inputs)
    planned = []
    for stage in stages:
        if stage == "REWARD" and given:
            continue
        if stage == "PRETRAIN":
            with raises_if_unplannable(stage):
                planned.append(_pretrain(models, where))
            continue
        rows = {"ACTOR": inputs.actor, "REWARD": inputs.reward, "RL": inputs.prompts}[stage]

        def counted(limit: int, stage: str = stage, rows: Rows | None = rows) -> Counted:
            return count(stage, rows, encoder, limit, assumed, _holds_out(config, stage), config)

        sharding = sharding_of(config, SECTION[stage], where.count)
        with raises_if_unplannable(stage):
            planned.append(_stage(stage, models, rows, counted, sharding, where, has_function))
    for each in planned:
        each.made.phases = [_with_process(phase, where.device.type) for phase in each.phases]
    return RunPlan(where, planned, inputs, list(dict.fromkeys(notes + models.notes)))


def _stage(stage, models, rows, counted, sharding, where, has_function) -> Planned:
    if stage == "RL":
        return _rl(models, counted, sharding, where, has_function)
    config = models.config
    section = getattr(config, SECTION[stage])
    counts = counted(min(section.max_sequence_length, _context(models, stage)))
    micro, backwards = microbatching(section, SECTION[stage], where.count)
    held_out = min(eval_batch_size(micro, section.max_sequence_length), counts.held_out)
    batch = Batch(micro, counts.longest, backwards, held_out)
    if stage == "ACTOR" and models.actor_is_paired():
        batch = replace(batch, tokens=counts.sides.prompt, reply=counts.sides.reply)
    if stage == "ACTOR":
        made = actor_stage(models, batch, sharding)
    else:
        made = reward_stage(models, batch, sharding, _pairs(section, rows))
    steps = tokens = duration = None
    if counts.rows is not None:
        steps = section.epochs * -(-counts.rows // section.batch_size)
        tokens = section.epochs * counts.rows * counts.mean
        duration = _training_seconds(stage, section, made, counts, where, _pairs(section, rows))
    return Planned(stage, made, sharding, counts, batch, steps, tokens, duration)


def _pretrain(models: Models, where: Hardware) -> Planned:
    """The ACTOR stage's model on rows that are all of one length."""
    config, keys = models.config, models.config.pretrain_config
    shared = {name: getattr(keys, name) for name in ("max_sequence_length", "gradient_checkpointing", "precision")}
    alone = {"label_smoothing_factor": 0.0, "neftune_noise_alpha": None, "epochs": 1, "batch_size": keys.batch_size}
    actor = config.actor_config.model_copy(update=shared | alone)
    models = Models(config.model_copy(update={"actor_config": actor}), models.fake_device)
    micro, backwards = microbatching(keys, "pretrain_config", where.count)
    length, rows = keys.max_sequence_length, keys.steps * keys.batch_size
    held_out = micro if keys.validation_fraction or keys.validation_dataset_path else 0
    batch = Batch(micro, length, backwards, held_out)
    counts = Counted(rows, held_out, length, length, Sides(length, 0, 0), "given")
    sharding = sharding_of(config, "actor_config", where.count)
    made = actor_stage(models, batch, sharding, "PRETRAIN")
    duration = _training_seconds("ACTOR", actor, made, counts, where, False)
    return Planned("PRETRAIN", made, sharding, counts, batch, keys.steps, float(keys.tokens), duration)


def _training_seconds(
    stage: str, section: ActorConfig | RewardConfig, made: StagePlan, counts: Counted, where: Hardware, pairs: bool
) -> float | None:
    trained_on = counts.sides.mean_reply if made.dimensions.in_encoder else counts.mean
    forward = made.dimensions.forward(counts.mean, trained_on if stage == "ACTOR" else 0)
    if stage == "REWARD" and pairs:
        forward *= 2
    checkpointing = getattr(section, "gradient_checkpointing", False)
    share = 1.0 if made.trained > made.parameters / 2 else made.trained / made.parameters
    flop = section.epochs * counts.rows * forward * training_forwards(share, checkpointing)
    return seconds(flop, where.device, made.in_bf16, where.count)


def _rl(models, counted, sharding, where, has_function) -> Planned:
    config, trainer = models.config, models.config.trainer_config
    context = _context(models, "RL")
    # A limit of its own: a prompt has to leave room for a response.
    counts = counted(min(config.actor_config.max_sequence_length, context) - 1)
    known = counts.longest if counts.how == "counted" else None
    batch = rollout_batch(config, where.count, context, known)
    made = rl_stage(models, batch, sharding, has_function)
    step = _rl_step_seconds(made, batch, counts, config, where)
    duration = None if step is None else trainer.num_steps * step
    tokens = float(trainer.total_episodes * batch.response)
    return Planned("RL", made, sharding, counts, batch, trainer.num_steps, tokens, duration)


def _rl_step_seconds(
    made: StagePlan, batch: RolloutBatch, counts: Counted, config: Config, where: Hardware
) -> float | None:
    """Of one rollout batch and its update, every response as long as it may be."""
    trainer, device = config.trainer_config, where.device
    model = made.dimensions
    prompt = counts.mean if counts.how == "counted" else batch.prompt
    total = prompt + batch.response
    whole = model.forward(total, batch.response)
    size = 2 if made.in_bf16 else 4
    cache = 2 * size * model.layers * model.cached
    read = size * (model.in_decoder + model.hidden * model.vocab) * -(-batch.rollouts // batch.slots) * batch.response
    read += cache * batch.rollouts * batch.response * (prompt + batch.response / 2)
    decoded = batch.rollouts * model.forward(total - 1, batch.response)
    rollout = decoding_seconds(read, device, decoded, made.in_bf16)
    critic = made.beside[CRITIC].states(total, batch.response) if CRITIC in made.beside else 0
    judged = made.beside[REWARD].states(total, 0) if REWARD in made.beside else 0
    score = batch.rollouts * (2 * whole + critic + judged)
    share = min(made.trained / made.parameters, 1.0)
    if trainer.num_layers_unfrozen > 0:
        # What is frozen ran once; of the rest there are a forward and a backward an epoch.
        states = model.states(total, batch.response)
        update = 3 * (whole - states * (1 - trainer.num_layers_unfrozen / model.layers))
    else:
        update = training_forwards(share, False) * whole
    update = trainer.ppo_epochs * batch.rollouts * (update + 3 * critic)
    rest = seconds(score + update, device, made.in_bf16, 1)
    return None if rollout is None or rest is None else rollout + rest


def _with_process(phase: Phase, device_type: str) -> Phase:
    name, size = BESIDE[device_type]
    return replace(phase, parts=phase.parts | {name: size})


def _is_used_as_it_is(config: Config, stages: list[str], trained: Path) -> bool:
    """Whether a reward model is there already; one that cannot be reached is, where there is nothing to train it on."""
    reward = config.reward_config
    try:
        return is_used_as_it_is(reward, stages, trained)
    except MissingError:
        return has_shape(reward.model) and reward.train_dataset_path is None and not reward.datasets


def _context(models: Models, stage: str) -> int:
    """Tokens that a stage's model reads at most."""
    config = models.config
    name, key, section = config.actor_config.model, "actor_config.model", config.actor_config
    if stage == "REWARD" and config.reward_config.model not in ("actor", "tiny", None):
        name, key, section = config.reward_config.model, "reward_config.model", config.reward_config
    if name == "tiny":
        return config.actor_config.tiny.max_position_embeddings
    return positions(models.settings(name, key, section))


def _pairs(section: RewardConfig, rows: Rows | None) -> bool:
    """Whether a row is two completions; where no one knows, it is taken to be."""
    if rows is not None and len(rows.train):
        return isinstance(rows.train[0], Preference)
    return getattr(section, "loss", None) != "regression"


def _holds_out(config: Config, stage: str) -> bool:
    section = config.trainer_config if stage == "RL" else getattr(config, SECTION[stage])
    file = getattr(section, "validation_dataset_path", None) or getattr(section, "validation_examples_path", None)
    return bool(section.validation_fraction or file)
