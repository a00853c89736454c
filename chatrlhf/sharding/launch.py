"""Which of DeepSpeed, FSDP2 or nothing a stage's switches ask for, and whether that can be had."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from chatrlhf.config.schema import ActorConfig, Config, PretrainConfig, RewardConfig
from chatrlhf.config.strict_json import load_settings
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.collectives import world_size
from chatrlhf.runtime.device import DTYPES, pick_device, resolve_precision, resolve_rl_precision
from chatrlhf.sharding.accelerate_env import (
    DEEPSPEED,
    FSDP,
    LAUNCHED,
    DeepSpeed,
    Fsdp2,
    Sharding,
    is_on,
    launched_by_accelerate,
    require_deepspeed,
    shards_params,
)
from chatrlhf.sharding.deepspeed_config import AUTO, Optimization, completed, filled, read_deepspeed_config
from chatrlhf.sharding.engine import Engine

# RL trains policy and critic together, as the actor's section says; PRETRAIN trains the actor.
SECTION = {"PRETRAIN": "actor_config", "ACTOR": "actor_config", "REWARD": "reward_config", "RL": "actor_config"}
KEYS = ("deepspeed_enable", "deepspeed_config_path", "accelerate_enable")
COMMAND = "accelerate launch --config_file artifacts/config/accelerate/4xA100.yaml main.py config.yaml"


def sharding_of(config: Config, stage: str) -> Sharding:
    """Who shards what a stage trains; None where every process has all of it.

    Raises:
        ConfigError: a switch asks for what this launch or installation does not have, or the YAML and the launcher's
            configuration contradict each other.
    """
    section = SECTION[stage]
    keys = getattr(config, section)
    if stage == "RL":
        _same_for_the_critic(config)
    if keys.deepspeed_enable:
        require_deepspeed(f"{section}.deepspeed_enable")
        settings, path = read_deepspeed_config(config, section)
        return DeepSpeed(completed(settings, str(path), optimization_of(config, stage)), str(path))
    if not keys.accelerate_enable:
        return None
    if not launched_by_accelerate():
        raise ConfigError(
            f"{section}.accelerate_enable: True is for a run that accelerate starts; start it by\n    {COMMAND}\n"
            "or set accelerate_enable to False"
        )
    return _of_accelerate(config, stage)


def check_launch(config: Config, stages: list[str]) -> None:
    """Refuse what `sharding_of` refuses, of any stage, and a launcher's wish that no stage has.

    Raises:
        ConfigError: see there.
    """
    for stage in stages:
        sharding = sharding_of(config, stage)
        _check_fp16(config, stage, sharding)
        if getattr(config, SECTION[stage]).is_quantized and shards_params(sharding):
            raise ConfigError(
                f"{SECTION[stage]}.load_in_4bit, load_in_8bit: {sharding} would shard weights that are quantized, "
                'which bitsandbytes cannot read in parts; use DeepSpeed with "stage": 2, which leaves them whole'
            )
    asked = "FSDP" if is_on(FSDP) else "DeepSpeed" if is_on(DEEPSPEED) else None
    sections = dict.fromkeys(SECTION[stage] for stage in stages)
    if asked and not any(getattr(config, section).accelerate_enable for section in sections):
        raise ConfigError(
            f"accelerate was configured for {asked}, and {' and '.join(sections)} have accelerate_enable: False; set "
            "it to True where it is meant, or launch by a configuration without it"
        )


def optimization_of(config: Config, stage: str) -> Optimization:
    """What the YAML says about a stage's optimizer steps."""
    device = pick_device()
    if stage == "RL":
        name, lr_key, micro, accumulated = "trainer_config", "actor_lr", config.trainer_config.micro_batch_size, None
        precision = resolve_rl_precision(config.trainer_config.precision, device)
    else:
        name, lr_key = "pretrain_config" if stage == "PRETRAIN" else SECTION[stage], "lr"
        micro, accumulated = microbatching(getattr(config, name), name)
        precision = resolve_precision(getattr(config, name).precision, device)
    section = getattr(config, name)
    return Optimization(
        section=name,
        batch_size=section.batch_size,
        micro=micro,
        accumulated=accumulated,
        lr_key=lr_key,
        lr=getattr(section, lr_key),
        betas=section.betas,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        lr_scheduler=section.lr_scheduler,
        warmup_steps=section.warmup_steps,
        precision=precision,
    )


def engine_of(sharding: Sharding, config: Config, modules: list[nn.Module], groups: list[dict[str, Any]]) -> Engine:
    """What trains a part of the RL stage's actor-critic: see `sharding.engine`."""
    step = optimization_of(config, "RL")
    if isinstance(sharding, DeepSpeed):
        from chatrlhf.sharding.deepspeed import ZeroEngine

        return ZeroEngine(modules, groups, filled(sharding.settings, step), step.betas, step.weight_decay)
    from chatrlhf.sharding.fsdp import FsdpEngine

    return FsdpEngine(modules, groups, DTYPES[step.precision], step.betas, step.weight_decay, step.max_grad_norm)


def _check_fp16(config: Config, stage: str, sharding: Sharding) -> None:
    step = optimization_of(config, stage)
    if step.precision != "fp16":
        return
    if pick_device().type != "cuda":
        raise ConfigError(f"{step.section}.precision: fp16 is for GPUs; use bf16 or fp32 here")
    if stage == "RL" and not isinstance(sharding, DeepSpeed):
        raise ConfigError(
            f"{step.section}.precision: fp16 needs a loss that is scaled, which RL has by DeepSpeed alone; use bf16, "
            "or set actor_config.deepspeed_enable to True"
        )


def _same_for_the_critic(config: Config) -> None:
    actor, critic = config.actor_config, config.critic_config
    for key in KEYS:
        ours, theirs = getattr(actor, key), getattr(critic, key)
        if key in critic.model_fields_set and theirs != ours:
            raise ConfigError(
                f"critic_config.{key}: {theirs!r} and actor_config.{key}: {ours!r} differ, and RL trains policy and "
                f"critic in one launch; leave critic_config.{key} out, or make them equal"
            )


def _of_accelerate(config: Config, stage: str) -> Sharding:
    step = optimization_of(config, stage)
    precision = os.environ[LAUNCHED].lower()
    if precision not in ("no", step.precision) and not is_on(DEEPSPEED):
        raise ConfigError(
            f"{step.section}.precision makes it {step.precision}, and accelerate's configuration has mixed_precision: "
            f"{precision}; make them equal, or set mixed_precision to 'no'"
        )
    if is_on(FSDP):
        return _fsdp()
    if not is_on(DEEPSPEED):
        return None
    require_deepspeed(f"{SECTION[stage]}.accelerate_enable")
    source = "accelerate's configuration"
    return DeepSpeed(completed(_settings_of_accelerate(), source, step), source)


def supports_fsdp() -> bool:
    """Whether accelerate has FSDP for this launch."""
    return world_size() == 1 or pick_device().type != "cpu"


def _fsdp() -> Fsdp2:
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ConfigError(f"accelerate's configuration: fsdp_version is {version}; set it to 2")
    if is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "accelerate's configuration: fsdp_cpu_ram_efficient_loading: true leaves all processes but one without "
            "weights when RL's models are loaded; set it to false"
        )
    if not supports_fsdp():
        raise ConfigError(
            "accelerate's configuration: it has FSDP on GPUs only (accelerate.state.AcceleratorState leaves a launch "
            "on CPUs at DDP); set use_cpu to false, or use DeepSpeed"
        )
    return Fsdp2()


def _settings_of_accelerate() -> dict[str, Any]:
    """DeepSpeed's settings as accelerate's launcher has passed them on."""
    from accelerate.utils import DeepSpeedPlugin

    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is not None and Path(path).is_file():
        load_settings(Path(path))  # refuses keys given twice, of which the plugin would take the last
    try:
        settings = dict(DeepSpeedPlugin().deepspeed_config)
    except ValueError as error:
        raise ConfigError(f"accelerate's configuration: {str(error).strip().splitlines()[0]}") from None
    if path is None and settings.get("gradient_accumulation_steps") == 1:
        settings["gradient_accumulation_steps"] = AUTO  # the launcher's own default, not anybody's wish
    settings.pop("steps_per_print", None)
    return settings


def microbatching(
    config: PretrainConfig | ActorConfig | RewardConfig, section: str, ranks: int | None = None
) -> tuple[int, int]:
    """(rows of a backward on each rank, backwards of an optimizer step).

    Args:
        ranks: of a launch that is planned; None: this one's.

    Raises:
        ConfigError: ranks and microbatches do not divide the batch evenly; the key is named.
    """
    ranks = ranks or world_size()
    own, rest = divmod(config.batch_size, ranks)
    if rest:
        near = " or ".join(str(each * ranks) for each in (own, own + 1) if each)
        raise ConfigError(
            f"{section}.batch_size: {config.batch_size} is not divisible by the {ranks} processes of this "
            f"launch; set it to {near}"
        )
    micro = min(config.micro_batch_size or own, own)
    if own % micro:
        raise ConfigError(
            f"{section}.micro_batch_size: {micro} does not divide the {own} rows that each of {ranks} processes "
            f"has of a batch of {config.batch_size}; set it to a divisor of {own}"
        )
    return micro, own // micro
