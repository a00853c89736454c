"""`--dry-run`: the resolved configuration and the plan of the run; nothing is trained or written."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import yaml

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import Config
from chatrlhf.errors.redaction import redacted, redacted_tree
from chatrlhf.models.critic_init import ALL_BLOCKS
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.runtime.run_log import quiet_libraries
from chatrlhf.tools.plan.data_counts import Assumed
from chatrlhf.tools.plan.flops import OF_BANDWIDTH, UTILISATION
from chatrlhf.tools.plan.hardware import GB, GiB, Hardware
from chatrlhf.tools.plan.rl_memory import RolloutBatch
from chatrlhf.tools.plan.run_plan import Planned, RunPlan, plan_run
from chatrlhf.tools.plan.sft_reward_memory import Phase


def show_plan(config: Config, type: str, hardware: Hardware | None = None, assumed: Assumed | None = None) -> None:
    """Print what a run of ``type`` would do and need. Raises UserError where that run would refuse to start."""
    stages = config.stages(type)
    quiet_libraries()
    plan = plan_run(config, stages, hardware, assumed)
    yaml.safe_dump(redacted_tree(config.model_dump(mode="json")), sys.stdout, sort_keys=False, allow_unicode=True)
    print("\n# plan")
    for line in lines(config, plan, stages):
        print(redacted(line))
    for warning in [*config.notes, *plan.inputs.warnings]:
        print(redacted(f"warning: {warning}"))


def lines(config: Config, plan: RunPlan, stages: list[str]) -> Iterator[str]:
    """The plan, line by line."""
    device = plan.hardware.device
    yield f"output_dir: {config.run_dir}"
    yield f"hardware: {plan.hardware.name}, {device.memory / GiB:,.0f} GiB each"
    if "REWARD" in stages and "REWARD" not in [each.name for each in plan.stages]:
        yield f"REWARD: skipped, the reward is {config.reward_config.reward_fn or config.reward_config.model}"
    for planned in plan.stages:
        yield ""
        yield from _of_stage(config, planned, plan.hardware)
    yield ""
    yield _time_line(plan)
    for note in [*plan.notes, *plan.inputs.notes]:
        yield f"note: {note}"


def _of_stage(config: Config, planned: Planned, hardware: Hardware) -> Iterator[str]:
    name, made = planned.name, planned.made
    actor, reward = config.actor_config.model, config.reward_config.model
    of_model = {"PRETRAIN": actor, "ACTOR": actor, "REWARD": reward}.get(name)
    what = f"{of_model}, {made.parameters:,} parameters" if of_model else f"a policy of {made.parameters:,} parameters"
    share = f"{made.trained:,} trained"
    share += ", the critic's too" if name == "RL" else f" ({100 * made.trained / made.parameters:.3g} %)"
    yield f"{name}: {what}, {share}; in {'bf16' if made.in_bf16 else 'fp32'}; {planned.sharding.line}"
    of_stage = {"PRETRAIN": _pretrain_lines, "RL": _rl_lines}
    yield from of_stage.get(name, _epoch_lines)(config, planned)
    for phase in planned.phases:
        yield "  " + memory_line(phase)
    yield "  " + fit_line(planned.most, hardware)
    if planned.seconds is not None:
        cost = f"about {duration(planned.seconds)}"
        yield f"  {planned.tokens:,.0f} tokens {'sampled at most' if name == 'RL' else 'read'}, {cost}"


def _pretrain_lines(config: Config, planned: Planned) -> Iterator[str]:
    p, batch = config.pretrain_config, planned.batch
    yield (
        f"  {p.steps} optimizer steps of {p.batch_size} rows of {p.max_sequence_length:,} tokens "
        f"({batch.backwards} backwards of {batch.rows}), {p.tokens:,} tokens in all"
    )


def _epoch_lines(config: Config, planned: Planned) -> Iterator[str]:
    section = config.actor_config if planned.name == "ACTOR" else config.reward_config
    counted, batch = planned.counted, planned.batch
    ranks = f" on each of {planned.sharding.ranks} devices" if planned.sharding.ranks > 1 else ""
    a_batch = f"{section.batch_size} rows ({batch.backwards} backwards of {batch.rows}{ranks})"
    lengths = f"at most {counted.longest:,} tokens a row, {counted.mean:,.0f} on average"
    if counted.rows is None:
        yield f"  {section.epochs} epochs x optimizer steps of {a_batch}; rows are {counted.how}; {lengths}"
        return
    whole, rest = divmod(counted.rows, section.batch_size)
    last = f", the last of {rest}" if rest else ""
    yield (
        f"  {section.epochs} epochs x {whole + bool(rest):,} optimizer steps of {a_batch}{last}, over "
        f"{counted.rows:,} rows ({counted.how}); {counted.held_out} rows held out; {lengths}"
    )


def _rl_lines(config: Config, planned: Planned) -> Iterator[str]:
    t, batch = config.trainer_config, planned.batch
    assert isinstance(batch, RolloutBatch)
    minibatches = t.num_rollouts // t.batch_size
    yield (
        f"  RL: {t.total_episodes} episodes = {t.num_steps} steps x {t.num_rollouts} rollouts "
        f"({t.num_rollouts // t.samples_per_prompt} prompts x {t.samples_per_prompt}), "
        f"decoded {t.chunk_size} at a time, {batch.prompt} + {batch.response} tokens at most"
    )
    yield (
        f"  a step updates {t.ppo_epochs} epochs x {minibatches} minibatches of {t.batch_size} sequences "
        f"(a backward has room for the {t.micro_batch_size} longest); "
        f"{t.num_optimizer_steps} optimizer steps in all"
    )
    if planned.counted.rows is not None:
        seen = t.total_episodes / t.samples_per_prompt / planned.counted.rows
        yield f"  {planned.counted.rows:,} prompts, each seen {seen:.1f} times; {planned.counted.held_out} held out"
    if t.num_layers_unfrozen != ALL_BLOCKS:
        blocks = planned.made.dimensions.layers
        yield f"  RL: trains the top {t.num_layers_unfrozen} of {blocks} blocks"
    if config.actor_config.peft_enable:
        yield f"  RL: trains adapters of rank {load_peft_config(config).r}, or continues with the actor's"
    critic = config.critic_config.model
    if not ALGORITHMS[t.algorithm].needs_critic:
        yield "  critic: none"
    elif critic == "shared":
        yield "  critic: a head on the actor's trunk"
    else:
        yield f"  critic: {critic or 'starts from the reward model where that fits, else from the actor'}"


def memory_line(phase: Phase) -> str:
    """A phase's memory and what it is made of."""
    parts = sorted(phase.parts.items(), key=lambda part: -part[1])
    inside = ", ".join(f"{name} {size / GB:.2f}" for name, size in parts if size >= 0.005 * GB)
    host = f"; {phase.host / GB:.1f} GB in the CPU's memory" if phase.host else ""
    return f"{phase.name}: {phase.total / GB:.2f} GB a device ({inside}){host}"


def fit_line(phase: Phase, hardware: Hardware) -> str:
    """Whether a stage fits."""
    room, least = hardware.device.memory, phase.total
    verdict = "fits" if least <= room else "does NOT fit"
    return f"{verdict}: {least / GB:.1f} of {room / GB:.1f} GB ({100 * least / room:.0f} %), in {phase.name}"


def duration(seconds: float) -> str:
    """In the unit that suits."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _time_line(plan: RunPlan) -> str:
    device = plan.hardware.device
    if device.peak is None:
        return "time: not estimated; --gpu takes the name of a device whose peak is known, such as A100-80GB"
    of_what = "a product measured just now" if device.type == "cpu" else f"{device.peak / 1e12:,.0f} TFLOP/s in 16 bit"
    return f"time: at {UTILISATION:.0%} of {of_what}, decoding at {OF_BANDWIDTH:.0%} of the memory's bandwidth"
