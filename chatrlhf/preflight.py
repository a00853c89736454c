"""Checks that come before long work: everything a later stage would stumble over, found before the first one starts."""

from __future__ import annotations

from pathlib import Path

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import Config
from chatrlhf.data.collate import Encoder, fitting
from chatrlhf.data.inputs import Inputs, Rows, corpus
from chatrlhf.data.templates import OWN, get_template
from chatrlhf.data.views import Preference, ScoredCompletion
from chatrlhf.errors import ConfigError
from chatrlhf.generation.vllm_sampler import require_vllm
from chatrlhf.models.adapters import base_of
from chatrlhf.models.factory import (
    TINY,
    block_count,
    read_model_config,
    require_reward_model,
    tokenizer_and_settings,
)
from chatrlhf.models.frozen_trunk import refuse_more_than
from chatrlhf.models.reward_model import SETTINGS
from chatrlhf.models.rope import positions, refuse_rotations_by_length
from chatrlhf.rl.rewards import load_function
from chatrlhf.trainers.global_batches import rows_a_backward


def preflight(config: Config, stages: list[str], inputs: Inputs, has_reward_fn: bool, run_dir: Path) -> None:
    """Check templates, functions, models and lengths of all stages that will run.

    Raises:
        ConfigError, DataError: the first thing that would fail later.
    """
    actor, reward, trainer = config.actor_config, config.reward_config, config.trainer_config
    if reward.template and reward.template != OWN:
        get_template(reward.template, "reward_config.template", folder=config.base_dir)
    if "RL" in stages and trainer.rollout_backend == "vllm":
        temperature = trainer.gen_kwargs.temperature or actor.temperature or 1.0
        require_vllm(temperature, len(trainer.gen_kwargs.forbidden_tokens) + 1)
    if "RL" in stages and trainer.eval_fn:
        load_function(trainer.eval_fn, "trainer_config.eval_fn")
    if "RL" in stages and "REWARD" not in stages and not has_reward_fn:
        require_reward_model(run_dir / "reward", reward)
    if "ACTOR" in stages:
        rows_a_backward(actor, "actor_config")
    if "REWARD" in stages and not has_reward_fn:
        rows_a_backward(reward, "reward_config")
    _check_models(config, stages, has_reward_fn)
    if "RL" in stages:
        refuse_more_than(trainer.num_layers_unfrozen, block_count(actor))
    if actor.peft_enable:
        _check_adapters(config, stages, run_dir)
    tokenizer, settings = tokenizer_and_settings(actor, corpus(config))
    longest = min(actor.max_sequence_length, positions(settings))
    if "RL" in stages:
        refuse_rotations_by_length(settings, longest)
    template = get_template(actor.template, tokenizer=tokenizer, folder=config.base_dir)
    encoder = Encoder.of(tokenizer, template, longest)
    _check_lengths(config, inputs, encoder)


def _check_models(config: Config, stages: list[str], has_reward_fn: bool) -> None:
    """Every model that is named can be found; its weights are not read."""
    if config.actor_config.model != TINY:
        read_model_config(config.actor_config.model, "actor_config.model", config.actor_config)
    name = config.reward_config.model
    if "REWARD" in stages and not has_reward_fn and name not in (None, "actor", TINY):
        read_model_config(name, "reward_config.model", config.reward_config)
    critic = config.critic_config.model
    # ChatLLaMA names the critic's model even where the trained reward model takes its place.
    if "RL" in stages and critic not in (None, "shared") and not (Path(critic) / SETTINGS).exists():
        read_model_config(critic, "critic_config.model", config.actor_config)


def _check_adapters(config: Config, stages: list[str], run_dir: Path) -> None:
    """Adapters belong to weights that lie somewhere."""
    load_peft_config(config)
    model, folder = config.actor_config.model, run_dir / "actor"
    if model == TINY and ("ACTOR" in stages or ("RL" in stages and not folder.exists())):
        raise ConfigError(
            "actor_config.peft_enable: adapters are saved without the weights they belong to, and those of 'tiny' are "
            "made on the spot; name a model, or run --type ACTOR with peft_enable: False before --type RL"
        )
    if config.actor_config.is_quantized and "RL" in stages:
        raise ConfigError(
            "actor_config.load_in_4bit, load_in_8bit: this version has weights in few bits in the ACTOR stage alone; "
            "run --type ACTOR with them and --type RL without: it goes on with the adapters, upon whole weights"
        )
    if "ACTOR" in stages and base_of(model) is not None:
        raise ConfigError(
            f"actor_config.peft_enable: {model} holds adapters itself, and adapters upon adapters could not be loaded "
            "again; merge them first (chatrlhf export merge), or set peft_enable to False"
        )


def _check_lengths(config: Config, inputs: Inputs, encoder: Encoder) -> None:
    """At least one row of each file fits the context, counted with the actor's tokenizer, or is cut to it."""
    reward_limit = min(config.reward_config.max_sequence_length, encoder.max_length)
    if inputs.actor is not None and config.actor_config.over_length == "drop":
        rows = inputs.actor.train
        lengths = [len(encoder.actor_row(row, "completion")[0]) for row in rows]
        _some_fit(inputs.actor, lengths, encoder.max_length)
    if inputs.reward is not None and config.reward_config.over_length == "drop":
        rows = inputs.reward.train
        lengths = [len(encoder.prompt(row.prompt)) + len(encoder.completion(_longer_reply(row))) for row in rows]
        _some_fit(inputs.reward, lengths, reward_limit)
    if inputs.prompts is not None:
        lengths = [len(encoder.prompt(prompt)) + 1 for prompt in inputs.prompts.train]
        _some_fit(inputs.prompts, lengths, encoder.max_length)


def _some_fit(rows: Rows, lengths: list[int], limit: int) -> None:
    """Of every epoch at least one."""
    source = ", ".join(rows.files) or "the datasets"
    kept, _ = fitting(range(len(lengths)), lengths, limit, source)
    rows.epochs.only(kept, source)


def _longer_reply(row: Preference | ScoredCompletion) -> str:
    return max(row.chosen, row.rejected, key=len) if isinstance(row, Preference) else row.completion
