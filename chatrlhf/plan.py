"""`--dry-run`: the resolved configuration, the batch plan and parameter counts; nothing is trained or written."""

from __future__ import annotations

import sys

import torch
import yaml
from torch import nn

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import ActorConfig, Config, RewardConfig
from chatrlhf.data.inputs import Inputs, corpus, read_inputs
from chatrlhf.device import pick_device, resolve_rl_precision
from chatrlhf.distributed import world_size
from chatrlhf.models.backbone import backbone_of
from chatrlhf.models.classifier import is_used_as_it_is
from chatrlhf.models.critics import ALL_BLOCKS
from chatrlhf.models.factory import TINY, block_count, meta_model, parameter_count, tiny_model
from chatrlhf.models.tokenizer import train_tokenizer
from chatrlhf.preflight import preflight
from chatrlhf.progress import quiet_libraries
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.trainers.global_batches import rows_a_backward


def show_plan(config: Config, type: str) -> None:
    """Print what a run of ``type`` would do. Raises UserError where that run would refuse to start."""
    stages = ["ACTOR", "REWARD", "RL"] if type == "ALL" else [type]
    keys = config.reward_config
    has_function = keys.reward_fn is not None or is_used_as_it_is(keys, stages, config.run_dir / "reward")
    inputs = read_inputs(config, stages, needs_judgements=not has_function)
    quiet_libraries()
    preflight(config, stages, inputs, has_function, config.run_dir)
    out = sys.stdout
    yaml.safe_dump(config.model_dump(mode="json"), out, sort_keys=False, allow_unicode=True)
    print("\n# plan")
    print(f"output_dir: {config.run_dir}")
    device = pick_device()
    print(f"device: {device} (RL in {resolve_rl_precision(config.trainer_config.precision, device)})")
    for line in [*_parameter_lines(config, stages, has_function), *_batch_lines(config, stages, inputs), *inputs.notes]:
        print(line)
    for warning in [*config.notes, *inputs.warnings]:
        print(f"warning: {warning}")


def _batch_lines(config: Config, stages: list[str], inputs: Inputs) -> list[str]:
    lines = []
    for stage, name, rows in (("ACTOR", "actor_config", inputs.actor), ("REWARD", "reward_config", inputs.reward)):
        if stage in stages and rows is not None:
            lines.append(f"{stage}: {_epochs(config, name, rows.epochs.size)}; {len(rows.held_out)} rows held out")
    if "REWARD" in stages and inputs.reward is None:
        lines.append(f"REWARD: skipped, the reward is {config.reward_config.reward_fn or config.reward_config.model}")
    if "RL" in stages and inputs.prompts is not None:
        t = config.trainer_config
        minibatches = t.num_rollouts // t.batch_size
        lines += [
            f"RL: {t.total_episodes} episodes = {t.num_steps} steps x {t.num_rollouts} rollouts "
            f"({t.num_rollouts // t.samples_per_prompt} prompts x {t.samples_per_prompt}), "
            f"decoded {t.chunk_size} at a time",
            f"RL: a step updates {t.ppo_epochs} epochs x {minibatches} minibatches of {t.batch_size} sequences "
            f"(a backward has room for the {t.micro_batch_size} longest); "
            f"{t.num_optimizer_steps} optimizer steps in all",
            f"RL: {len(inputs.prompts.train)} prompts, each seen "
            f"{t.total_episodes / t.samples_per_prompt / len(inputs.prompts.train):.1f} times; "
            f"{len(inputs.prompts.held_out)} held out",
        ]
    return lines


def _epochs(config: Config, name: str, rows: int) -> str:
    section: ActorConfig | RewardConfig = getattr(config, name)
    steps = -(-rows // section.batch_size)
    micro, backwards = rows_a_backward(section, name)
    ranks = f" on each of {world_size()} processes" if world_size() > 1 else ""
    return (
        f"{section.epochs} epochs x {steps} optimizer steps of {section.batch_size} rows "
        f"({backwards} backwards of {micro}{ranks}) over {rows} rows"
    )


def _parameter_lines(config: Config, stages: list[str], has_function: bool) -> list[str]:
    actor = _skeleton(config.actor_config.model, config, config.actor_config, "actor_config.model")
    lines = [f"actor: {config.actor_config.model}, {parameter_count(actor):,} parameters"]
    name = config.reward_config.model
    if not has_function and name is not None:
        start = config.actor_config.model if name == "actor" else name
        reward = _skeleton(start, config, config.reward_config, "reward_config.model")
        lines.append(f"reward model: {name}, {parameter_count(backbone_of(reward)):,} parameters in its backbone")
    if "ACTOR" in stages and config.actor_config.peft_enable:
        lines.append(f"ACTOR: trains adapters of rank {load_peft_config(config).r}")
    if "RL" in stages:
        if (unfrozen := config.trainer_config.num_layers_unfrozen) != ALL_BLOCKS:
            lines.append(f"RL: trains the top {unfrozen} of {block_count(config.actor_config)} blocks")
        if config.actor_config.peft_enable:
            lines.append(f"RL: trains adapters of rank {load_peft_config(config).r}, or goes on with the actor's")
        critic = config.critic_config.model
        if not ALGORITHMS[config.trainer_config.algorithm].needs_critic:
            lines.append("critic: none")
        elif critic == "shared":
            lines.append("critic: a head on the actor's trunk")
        else:
            lines.append(f"critic: {critic or 'starts from the reward model where that fits, else from the actor'}")
    return lines


def _skeleton(name: str, config: Config, section: ActorConfig | RewardConfig, key: str) -> nn.Module:
    """The model without its weights."""
    if name == TINY:
        tokenizer = train_tokenizer(corpus(config), config.actor_config.tiny.vocab_size)
        with torch.device("meta"):
            return tiny_model(config.actor_config.tiny, tokenizer, config.actor_config.rope_scaling)
    return meta_model(name, key, section)
