"""Checks that come before long work: everything a later stage would stumble over, found before the first one starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import MODEL_MAPPING, LlamaConfig
from transformers.utils import is_flash_attn_2_available

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import ActorConfig, Config, RewardConfig
from chatrlhf.data.encoder import Encoder, fitting
from chatrlhf.data.encoder_seq2seq import refuse_row
from chatrlhf.data.inputs import Inputs, Rows, corpus
from chatrlhf.data.row_checks import check_lengths, sampled
from chatrlhf.data.stage_rows import Preference, ScoredCompletion
from chatrlhf.data.templates import actor_template, is_own, reward_template
from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.models.critic_init import refuse_critic_head, refuse_other_build
from chatrlhf.models.for_stages import block_count, encoder_class, require_reward_model, tokenizer_and_settings
from chatrlhf.models.frozen_trunk import refuse_more_than
from chatrlhf.models.loading.backbone import decoder_start, is_encoder_decoder
from chatrlhf.models.loading.loading_report import refuse_damaged
from chatrlhf.models.loading.lora import base_of, task_type
from chatrlhf.models.loading.pretrained import read_model_config
from chatrlhf.models.loading.rope import positions, refuse_rotations_by_length
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.reward_model import SETTINGS
from chatrlhf.models.stop_tokens import ids_without_token, refuse_unknown_ids
from chatrlhf.models.trained_heads import has_head
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.user_functions import load_function
from chatrlhf.rollout.vllm import require_vllm
from chatrlhf.runtime.check_result import CheckResult
from chatrlhf.runtime.device import pick_device, resolve_precision, resolve_rl_precision
from chatrlhf.sharding.launch import check_launch, microbatching
from chatrlhf.stages.data_checks import check_data, check_template, check_tokenizers


def check_keys_of_pairs(config: Config, stages: list[str], settings: Any) -> None:
    """Keys that an encoder–decoder actor has no use for.

    Args:
        settings: the configuration of the actor's model.

    Raises:
        ConfigError: the first of them.
    """
    actor, trainer = config.actor_config, config.trainer_config
    decoder_start(settings)
    if "PRETRAIN" in stages:
        raise ConfigError(
            f"pretrain_config: a {settings.model_type} predicts replies to what its encoder reads, and plain text has "
            "none; leave the section out, or take a causal model"
        )
    if "RL" in stages and type(settings) not in MODEL_MAPPING:
        raise ConfigError(
            f"actor_config.model: transformers' AutoModel knows no {settings.model_type}, so there is none without its "
            "head for a critic to be; take T5, BART or another encoder-decoder"
        )
    if "ACTOR" in stages and actor.loss_on != "completion":
        raise ConfigError(
            f"actor_config.loss_on: {actor.loss_on!r} asks for a loss on prompts, which the encoder of a "
            f"{settings.model_type} reads and nothing predicts; set it to completion"
        )
    if "RL" in stages and trainer.num_layers_unfrozen != -1:
        raise ConfigError(
            f"trainer_config.num_layers_unfrozen: {trainer.num_layers_unfrozen} parts the one stack of blocks that a "
            f"causal model is; a {settings.model_type} has two, and this version trains both; set it to -1, or train "
            "adapters (actor_config.peft_enable)"
        )
    if "RL" in stages and trainer.rollout_backend == "vllm":
        raise ConfigError(
            f"trainer_config.rollout_backend: vLLM samples from causal models, and the actor is a "
            f"{settings.model_type}; set it to chatrlhf"
        )


def check_rows_of_pairs(rows: Rows) -> None:
    """Rows of the ACTOR stage that an encoder–decoder cannot be trained on. Raises DataError at the first."""
    for row in (*rows.train, *rows.held_out):
        refuse_row(row)


SettingsOf = Callable[[str, str, Any], Any]  # of a model, by its name, its key and its section


def preflight(config: Config, stages: list[str], inputs: Inputs, has_reward_fn: bool, run_dir: Path) -> None:
    """Check templates, functions, models and lengths of all stages that will run.

    Raises:
        ConfigError, DataError: the first thing that would fail later.
    """
    check_settings(config, stages, has_reward_fn, run_dir)
    check_rows(config, stages, inputs)


def check_settings(
    config: Config,
    stages: list[str],
    has_reward_fn: bool,
    run_dir: Path,
    settings_of: SettingsOf = read_model_config,
    ranks: int | None = None,
) -> None:
    """What needs neither rows nor a tokenizer.

    Args:
        settings_of: a plan has another way to a model that cannot be reached.
        ranks: of a launch that is planned; None: this one's.
    """
    actor, reward, trainer = config.actor_config, config.reward_config, config.trainer_config
    if reward.template and not is_own(reward.template):
        reward_template(config, None)
    if "RL" in stages and trainer.rollout_backend == "vllm":
        temperature = trainer.gen_kwargs.temperature or actor.temperature or 1.0
        require_vllm(temperature, len(trainer.gen_kwargs.forbidden_tokens) + 1)
    if "RL" in stages and trainer.eval_fn:
        load_function(trainer.eval_fn, "trainer_config.eval_fn")
    if "RL" in stages and "REWARD" not in stages and not has_reward_fn:
        require_reward_model(run_dir / "reward", reward)
    if "PRETRAIN" in stages:
        microbatching(config.pretrain_config, "pretrain_config", ranks)
    if "ACTOR" in stages:
        microbatching(actor, "actor_config", ranks)
    if "REWARD" in stages and not has_reward_fn:
        microbatching(reward, "reward_config", ranks)
    if ranks is None:
        check_launch(config, [stage for stage in stages if stage != "REWARD" or not has_reward_fn])
    _check_models(config, stages, has_reward_fn, settings_of)
    settings = LlamaConfig() if actor.model == TINY else settings_of(actor.model, "actor_config.model", actor)
    if is_encoder_decoder(settings):
        check_keys_of_pairs(config, stages, settings)
    if "RL" in stages:
        _check_critic(config, settings, settings_of)
        refuse_more_than(trainer.num_layers_unfrozen, block_count(actor, settings_of))
        if actor.model != TINY:
            refuse_rotations_by_length(settings, min(actor.max_sequence_length, positions(settings)))
    _check_adapters(config, stages, has_reward_fn, run_dir)
    if actor.peft_enable:
        task_type(settings, load_peft_config(config))
    if ranks is None:  # what is installed on other hardware no one knows here
        _check_attention(config, stages)
        _refuse_damaged(config, stages, has_reward_fn)


def check_rows(config: Config, stages: list[str], inputs: Inputs) -> list[CheckResult]:
    """What needs the actor's tokenizer, and the rows that are there.

    Returns:
        What was measured, line by line; what is not well is among the warnings of ``inputs``, too.

    Raises:
        ConfigError, DataError: a stage could not begin.
    """
    actor = config.actor_config
    tokenizer, settings = tokenizer_and_settings(actor, corpus(config))
    if is_encoder_decoder(settings) and inputs.actor is not None:
        check_rows_of_pairs(inputs.actor)
    longest = min(actor.max_sequence_length, positions(settings))
    if "RL" in stages:
        refuse_rotations_by_length(settings, longest)
    if "PRETRAIN" in stages and config.pretrain_config.max_sequence_length > positions(settings):
        raise ConfigError(
            f"pretrain_config.max_sequence_length: {config.pretrain_config.max_sequence_length:,} tokens are more than "
            f"the {positions(settings):,} positions of {actor.model}; lower it, or stretch them "
            "(actor_config.rope_scaling)"
        )
    template = actor_template(config, tokenizer)
    if template.day is not None:
        inputs.notes.append(
            f"note: {template.origin} shows the date; it is {template.day:%d %B %Y} in this whole run, also when it is "
            "resumed, and in the folders that it leaves"
        )
    encoder = encoder_class(settings).of(tokenizer, template, longest)
    if "RL" in stages:
        _check_sampled_ids(config, tokenizer, settings.get_text_config().vocab_size)
    results = [
        *check_data(inputs),
        *_check_lengths(config, inputs, encoder),
        *check_template(inputs, encoder),
        *check_tokenizers(config, stages, inputs, tokenizer),
    ]
    inputs.warnings += [result.line for result in results if result.status != "pass"]
    return results


def _check_sampled_ids(config: Config, tokenizer: Any, rows: int) -> None:
    """`gen_kwargs` names ids that a model of so many has, and vLLM can forbid what is not to be sampled."""
    gen = config.trainer_config.gen_kwargs
    refuse_unknown_ids(gen, max(rows, len(tokenizer)))  # embeddings may be resized
    if config.trainer_config.rollout_backend == "vllm":
        unused = ids_without_token(tokenizer, rows)
        temperature = gen.temperature or config.actor_config.temperature or 1.0
        require_vllm(temperature, len({*gen.forbidden_tokens, tokenizer.pad_token_id, *unused}))


def _check_models(config: Config, stages: list[str], has_reward_fn: bool, settings_of: SettingsOf) -> None:
    """Every model that is named can be found; its weights are not read."""
    if config.actor_config.model != TINY:
        settings_of(config.actor_config.model, "actor_config.model", config.actor_config)
    name = config.reward_config.model
    if "REWARD" in stages and not has_reward_fn and name not in (None, "actor", TINY):
        settings_of(name, "reward_config.model", config.reward_config)
        with suppress(MissingError):  # a plan knows models that are not here
            has_head(config.reward_config)


def _refuse_damaged(config: Config, stages: list[str], has_reward_fn: bool) -> None:
    """Weight files that cannot be read are found before the first stage, whichever stage would read them."""
    named = {"actor_config.model": config.actor_config.model}
    if not has_reward_fn and {"REWARD", "RL"} & set(stages):
        named["reward_config.model"] = config.reward_config.model
    if "RL" in stages:
        named["critic_config.model"] = config.critic_config.model
    for key, name in named.items():
        if name not in (None, "actor", "shared", TINY):
            refuse_damaged(name, key)


def _check_critic(config: Config, settings: Any, settings_of: SettingsOf) -> None:
    """A critic that is named can be found, and reads what an actor of these settings reads."""
    critic = config.critic_config.model
    # ChatLLaMA names the critic's model even where the trained reward model takes its place.
    if critic not in (None, "shared") and not (Path(critic) / SETTINGS).exists():
        found = settings_of(critic, "critic_config.model", config.actor_config)
        refuse_other_build(found, settings, critic)
        with suppress(MissingError):
            refuse_critic_head(critic)


def _check_adapters(config: Config, stages: list[str], has_reward_fn: bool, run_dir: Path) -> None:
    """Adapters belong to weights that lie somewhere, and have the size they had."""
    actor, reward, critic = config.actor_config, config.reward_config, config.critic_config
    has_actor = "ACTOR" in stages or (run_dir / "actor").exists()
    makes_adapters = "PRETRAIN" in stages or "ACTOR" in stages
    if actor.peft_enable and (makes_adapters or "RL" in stages):
        load_peft_config(config)
        _refuse_resizing(actor, "actor_config")
        if actor.model == TINY and (makes_adapters or not has_actor):
            raise ConfigError(_made_on_the_spot("actor_config"))
        if makes_adapters and base_of(actor.model) is not None:
            raise ConfigError(
                f"actor_config.peft_enable: {actor.model} holds adapters itself, and adapters on top of adapters could "
                "not be loaded again; merge them first (chatrlhf export merge), or set peft_enable to False"
            )
    if reward.peft_enable and "REWARD" in stages and not has_reward_fn:
        load_peft_config(config, "reward_config")
        _refuse_resizing(reward, "reward_config")
        start = actor.model if reward.model == "actor" and not has_actor else reward.model
        if start == TINY:
            raise ConfigError(_made_on_the_spot("reward_config"))
        if reward.model not in (None, "actor", TINY) and base_of(reward.model) is not None and not has_head(reward):
            raise ConfigError(
                f"reward_config.peft_enable: {reward.model} holds adapters itself, and adapters on top of adapters "
                "could not be loaded again; merge them first (chatrlhf export merge), or set peft_enable to False"
            )
    if critic.peft_enable and "RL" in stages and ALGORITHMS[config.trainer_config.algorithm].needs_critic:
        load_peft_config(config, "critic_config")
        if critic.model == "shared":
            raise ConfigError(
                "critic_config.peft_enable: a critic that is a head on the policy's trunk has no weights to add to; "
                "set peft_enable to False, or critic_config.model to null"
            )
        if critic.model == TINY or (actor.model == TINY and not has_actor):
            raise ConfigError(_made_on_the_spot("critic_config"))


def _made_on_the_spot(section: str) -> str:
    return (
        f"{section}.peft_enable: adapters are saved without the weights they belong to, and those of 'tiny' are "
        "created on the fly; name a model, or run --type ACTOR with peft_enable: False before"
    )


def _refuse_resizing(section: ActorConfig | RewardConfig, name: str) -> None:
    if section.resize_embeddings:
        raise ConfigError(
            f"{name}.resize_embeddings: adapters are saved without the embeddings, so rows that are added would be "
            "lost; set it or peft_enable to False, or save a model with the rows first and name that"
        )


def _check_attention(config: Config, stages: list[str]) -> None:
    """flash-attn is installed, on a GPU, where it is asked for."""
    sections = {"PRETRAIN": "actor_config", "ACTOR": "actor_config", "REWARD": "reward_config", "RL": "actor_config"}
    for stage, name in sections.items():
        if stage not in stages or getattr(config, name).attn_implementation != "flash_attention_2":
            continue
        key, precision = f"{name}.attn_implementation", _precision(config, stage)
        if not is_flash_attn_2_available():
            raise ConfigError(
                f"{key}: flash_attention_2 needs an NVIDIA GPU and the package flash-attn, which is not usable here; "
                "install it, or set the key to null or sdpa"
            )
        if precision != "bf16":
            raise ConfigError(f"{key}: flash_attention_2 computes in bf16 alone, but {stage} is to run in {precision}")


def _precision(config: Config, stage: str) -> str:
    if stage == "RL":
        return resolve_rl_precision(config.trainer_config.precision, pick_device())
    sections = {"PRETRAIN": config.pretrain_config, "ACTOR": config.actor_config, "REWARD": config.reward_config}
    section = sections[stage]
    return resolve_precision(section.precision, pick_device())


def _check_lengths(config: Config, inputs: Inputs, encoder: Encoder) -> list[CheckResult]:
    """At least one row of each file fits the context, counted with the actor's tokenizer, or is cut to it."""
    actor, reward = config.actor_config, config.reward_config
    results = []

    def look(stage: str, rows: Rows | None, length: Callable[[Any], int], limit: int, over_length: str) -> None:
        if rows is None:
            return
        drops = over_length == "drop"
        # All rows that may be dropped are measured, to know that one is left; of those that are cut a sample will do.
        lengths = [length(row) for row in (rows.train if drops else sampled(rows.train))]
        if drops:
            _some_fit(rows, lengths, limit)
        results.append(check_lengths(stage, lengths, len(rows.train), limit, over_length))

    def of_actor(row: Any) -> int:
        return encoder.row_length(*encoder.actor_row(row, "completion"))

    def of_judged(row: Any) -> int:
        return len(encoder.judged(row.prompt, _longer_reply(row)))

    look("ACTOR", inputs.actor, of_actor, encoder.max_length, actor.over_length)
    # A template of its own may show what the actor's refuses.
    is_read_alike = reward.over_length == "drop" or reward.template is None
    judgements = inputs.reward if is_read_alike else None
    look("REWARD", judgements, of_judged, min(reward.max_sequence_length, encoder.max_length), reward.over_length)
    look("RL", inputs.prompts, lambda prompt: len(encoder.prompt(prompt)) + 1, encoder.max_length, "drop")
    return results


def _some_fit(rows: Rows, lengths: list[int], limit: int) -> None:
    """Of every epoch at least one."""
    source = ", ".join(rows.files) or "the datasets"
    kept, _ = fitting(range(len(lengths)), lengths, limit, source)
    rows.epochs.only(kept, source)


def _longer_reply(row: Preference | ScoredCompletion) -> str:
    return max(row.chosen, row.rejected, key=len) if isinstance(row, Preference) else row.completion
