"""Models side by side: which of them can be trained how on given hardware."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatrlhf.config.load import load_config
from chatrlhf.config.schema import Config
from chatrlhf.errors import ConfigError, UserError
from chatrlhf.tools.plan.fake_run import FakeDevice, raises_if_unplannable
from chatrlhf.tools.plan.hardware import GB, Hardware
from chatrlhf.tools.plan.meta_models import Models
from chatrlhf.tools.plan.rl_memory import rollout_batch
from chatrlhf.tools.plan.rl_stage import rl_stage
from chatrlhf.tools.plan.run_plan import BESIDE
from chatrlhf.tools.plan.sft_reward_memory import Batch, actor_stage, reward_stage
from chatrlhf.tools.plan.zero_memory import Sharding

ADAPTERS = {"peft_enable": True}
IN_4_BIT = ADAPTERS | {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
LARGEST_BATCH = 64


@dataclass(frozen=True)
class Way:
    """A stage and how its model is trained."""

    name: str
    stage: str
    how: dict[str, Any]


WAYS = (
    Way("SFT", "ACTOR", {}),
    Way("SFT, LoRA", "ACTOR", ADAPTERS),
    Way("SFT, QLoRA", "ACTOR", IN_4_BIT),
    Way("reward", "REWARD", {}),
    Way("PPO", "RL", {}),
    Way("PPO, LoRA", "RL", ADAPTERS),
    Way("PPO, QLoRA", "RL", IN_4_BIT),
)


@dataclass(frozen=True)
class Compared:
    """A model trained in one way, a row in each backward; and the most rows that fit."""

    model: str
    parameters: int
    way: Way
    memory: int  # bytes of a device, at one row
    host: int
    rows: int | None  # that fit in a backward; None: not even one

    @property
    def fits(self) -> bool:
        return self.rows is not None


def compare(
    names: Sequence[str], hardware: Hardware, tokens: int, sharding: Sharding | None = None, ways: Sequence[Way] = WAYS
) -> Iterator[Compared]:
    """Each model in each way, with activations computed again; as they come, since a plan takes seconds.

    Args:
        tokens: of a row.

    Raises:
        ConfigError: a model is not known, or cannot be laid out.
    """
    for name in names:
        for way in ways:
            with raises_if_unplannable(f"{name}, {way.name}"):
                found = _compared(name, way, hardware, tokens, sharding or usual(hardware))
            yield found


def usual(hardware: Hardware) -> Sharding:
    """Every device holds all."""
    return Sharding("ddp", hardware.count) if hardware.count > 1 else Sharding()


def _compared(name: str, way: Way, hardware: Hardware, tokens: int, sharding: Sharding) -> Compared:
    parameters, one, host = memory_of(name, way, hardware, tokens, sharding, 1)
    room = hardware.device.memory
    if one > room:
        return Compared(name, parameters, way, one, host, None)
    # A row more costs as much as the one before; what is there with none is there with all.
    two = memory_of(name, way, hardware, tokens, sharding, 2)[1]
    rows = 1 + int((room - one) // max(two - one, 1))
    return Compared(name, parameters, way, one, host, min(rows, LARGEST_BATCH))


def memory_of(
    name: str, way: Way, hardware: Hardware, tokens: int, sharding: Sharding, rows: int
) -> tuple[int, int, int]:
    """(parameters, bytes of a device, bytes of its host) with so many rows in a backward."""
    models = Models(configuration(name, way, tokens, rows), FakeDevice(hardware.device.type, hardware.device.bf16))
    # Several backwards an optimizer step: gradients are there while the next one is computed.
    batch = Batch(rows, tokens, backwards=2)
    if way.stage == "ACTOR" and models.actor_is_paired():
        batch = replace(batch, tokens=tokens - tokens // 2, reply=tokens // 2)
    if way.stage == "ACTOR":
        made = actor_stage(models, batch, sharding)
    elif way.stage == "REWARD":
        made = reward_stage(models, batch, sharding, pairs=True)
    else:
        made = rl_stage(models, rollout_batch(models.config, 1, tokens, tokens // 2), sharding, has_function=False)
    most = max(made.phases, key=lambda phase: phase.total)
    return made.parameters, most.total + BESIDE[hardware.device.type][1], most.host


def configuration(name: str, way: Way, tokens: int, rows: int) -> Config:
    """A usual one: a reward model like the actor, a value head on the policy, activations computed again."""
    again = {"gradient_checkpointing": True, "max_sequence_length": tokens}
    # Of PPO by adapters the reward model is built on the policy's weights.
    reward = {"model": name, **again, **(way.how if way.stage == "RL" else {})}
    rollouts = 8 * rows
    trainer = {
        "num_rollouts": rollouts,
        "chunk_size": min(rollouts, 16),
        "batch_size": rollouts // 2,
        "micro_batch_size": rows,
        "gradient_checkpointing": True,
        "gen_kwargs": {"max_new_tokens": tokens - tokens // 2},
    }
    actor = {"model": name, **again, **way.how}
    tree = {
        "actor_config": actor,
        "reward_config": reward,
        "critic_config": {"model": "shared"},
        "trainer_config": trainer,
    }
    try:
        return load_config(tree)
    except UserError as error:  # what is written here goes together
        raise ConfigError(f"{name}: {error}") from None


def cell(compared: Compared) -> str:
    """Gigabytes, and how many rows fit."""
    if not compared.fits:
        return f"{compared.memory / GB:.0f} GB, no"
    rows = f"{LARGEST_BATCH} rows or more" if compared.rows == LARGEST_BATCH else f"{compared.rows} rows"
    return f"{compared.memory / GB:.0f} GB, {rows if compared.rows > 1 else '1 row'}"
