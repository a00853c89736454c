"""The models that stages start from, by the names in their sections: made on the fly, of a folder, of the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import ActorConfig, Config, RewardConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.encoder_seq2seq import Seq2SeqEncoder
from chatrlhf.data.templates import Template, reward_template
from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.adapter_loading import continue_adapters
from chatrlhf.models.loading.backbone import backbone_of, is_encoder_decoder
from chatrlhf.models.loading.lora import (
    add_adapters,
    backbone_with_adapters,
    base_of,
    has_adapters,
    where,
)
from chatrlhf.models.loading.model_info import context_length
from chatrlhf.models.loading.pretrained import (
    as_held,
    freeze_as_asked,
    hub_kwargs,
    load_backbone,
    load_base_model,
    load_language_model,
    match_vocabulary,
    placed,
    read_model_config,
)
from chatrlhf.models.loading.quantization import quantization_of, ready_for_adapters
from chatrlhf.models.loading.sequence_classifier import load_trunk
from chatrlhf.models.loading.tiny import TINY, tiny_model, tiny_settings
from chatrlhf.models.loading.tokenizer import load_tokenizer, train_tokenizer
from chatrlhf.models.reward_model import RewardModel, RewardScorer, is_reward_model, load_reward_model
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import is_causal
from chatrlhf.models.trained_heads import has_head, trained_start
from chatrlhf.models.weight_sharing import Base


def load_actor(
    config: ActorConfig, texts: list[str], device: torch.device, precision: str | None = None
) -> tuple[nn.Module, Any]:
    """The model that `actor_config.model` names, in float32 or quantized, and its tokenizer.

    Args:
        texts: what the tokenizer of `model: tiny` is trained on.
        precision: that the stage computes in; None: the weights are to be whole, whatever the configuration says.

    Raises:
        ConfigError: it cannot be loaded; the reason is given.
    """
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        model = tiny_model(config.tiny, tokenizer, config.rope_scaling)
        if config.attn_implementation is not None:
            model.set_attn_implementation(config.attn_implementation)
    else:
        bits = quantization_of(config, precision, "actor_config") if precision else {}
        model = load_language_model(config.model, "actor_config.model", config, bits)
        match_vocabulary(model, tokenizer, config, "actor_config")
    return placed(freeze_as_asked(model, config), device), tokenizer


def load_base(
    config: ActorConfig, texts: list[str], device: torch.device, precision: str | None = None
) -> tuple[nn.Module, Any]:
    """As `load_actor`, of adapters in `actor_config.model` what they belong to, with the positions it had then."""
    key = "actor_config.model"
    bits = quantization_of(config, precision, "actor_config") if precision else {}
    model = load_base_model(config.model, key, config, bits)
    return placed(model, device), _actor_tokenizer(config, texts)


def tokenizer_and_settings(config: ActorConfig, texts: list[str]) -> tuple[Any, Any]:
    """The actor's tokenizer and its model's configuration, without reading weights."""
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        return tokenizer, tiny_settings(config.tiny, tokenizer, config.rope_scaling)
    return tokenizer, read_model_config(config.model, "actor_config.model", config)


def load_policy(
    folder: Path,
    device: torch.device,
    apart: bool = False,
    section: ActorConfig | None = None,
    precision: str | None = None,
) -> tuple[nn.Module, Any, Template | None]:
    """A policy that a stage left behind: model in float32, tokenizer, template.

    Args:
        apart: adapters stay adapters, and are trained on; otherwise they are merged into the weights.
        section: how it is to be held, where it is not made anew: attention, frozen embeddings, and with a
            ``precision`` quantized weights under adapters.
    """
    key = "actor_config.model"
    if apart and base_of(str(folder)) is not None:
        bits = quantization_of(section, precision, "actor_config") if section and precision else {}
        model = ready_for_adapters(load_base_model(str(folder), key, as_held(section), bits))
        continue_adapters(model, folder)
    else:
        model = load_language_model(str(folder), key, as_held(section))
        if section is not None:
            freeze_as_asked(model, section)
    return placed(model, device), load_tokenizer(str(folder), key), Template.load(folder)


def new_reward_model(
    whole: Config, actor_folder: Path | None, texts: list[str], device: torch.device, adapters: PeftConfig | None = None
) -> RewardScorer:
    """A reward model ready to be trained: what `reward_config.model` names, with its own head or under a fresh one.

    Args:
        whole: what its reward_config leaves open is the actor's.
        actor_folder: the fine-tuned actor, for `model: actor`; None where there is none, and then the actor's
            own starting point is taken.
        texts: what the tokenizer of `model: tiny` is trained on.
        adapters: trained instead of the backbone's weights; those that the fine-tuned actor has go on.
    """
    config = whole.reward_config
    actor = whole.actor_config.model_copy(update={"attn_implementation": config.attn_implementation})
    name, key = config.model, "reward_config.model"
    if has_head(config):
        return trained_start(whole, device, adapters)
    template = None
    bits = quantization_of(config, config.precision, "reward_config")
    if name == "actor" and actor_folder is not None:
        place = str(actor_folder)
        backbone = _actor_backbone(place, as_held(config), config, bits, adapters)
        revision, tokenizer = None, load_tokenizer(place, key)
        if config.template is None:
            template = Template.load(actor_folder)
    elif name == TINY or (name == "actor" and (adapters is None or actor.model == TINY)):
        start = actor if name == "actor" else actor.model_copy(update={"model": TINY})
        policy, tokenizer = load_actor(start, texts, device)
        place, revision, backbone = start.model, None, backbone_of(policy)
    elif name == "actor":
        place, revision, tokenizer = actor.model, actor.revision, _actor_tokenizer(actor, texts)
        backbone = _actor_backbone(place, actor, config, bits, adapters)
    else:
        place, revision, backbone = name, config.revision, load_trunk(name, key, config, bits)
        tokenizer = load_tokenizer(config.tokenizer_path or name, "reward_config.tokenizer_path", **hub_kwargs(config))
        match_vocabulary(backbone, tokenizer, config, "reward_config")
    pooling = pooling_for(backbone)
    head = ScalarHead(state_size(backbone), config.model_head_hidden_size)
    max_length = min(config.max_sequence_length, context_length(backbone))
    if adapters is None:
        freeze_as_asked(backbone, config)
    elif not has_adapters(backbone):
        backbone = ready_for_adapters(backbone, config.gradient_checkpointing)
        add_adapters(backbone, adapters, where(place), revision)
    model = RewardModel(backbone, head, pooling).to(device)
    if template is None:
        template = reward_template(whole, tokenizer)
    return RewardScorer(model, Encoder.of(tokenizer, template, max_length))


def trained_reward_model(
    folder: Path, config: RewardConfig, device: torch.device, base: Base | None = None, keep_adapters: bool = False
) -> RewardScorer:
    """The reward model of an earlier REWARD stage, or the folder that `reward_config.model` names; no one trains it.

    Args:
        base: weights in memory that its adapters may be built on.
        keep_adapters: as of `load_reward_model`.
    """
    scorer = load_reward_model(require_reward_model(folder, config), device, base, keep_adapters)
    scorer.model.requires_grad_(False)
    return scorer


def require_reward_model(folder: Path, config: RewardConfig) -> Path:
    """The folder of `trained_reward_model`. Raises ConfigError where there is none."""
    has_data = config.train_dataset_path is not None or bool(config.datasets)
    if has_data and is_reward_model(folder):
        return folder  # the model that is named was only its start
    if config.model and is_reward_model(config.model):
        return Path(config.model)  # named outright
    if is_reward_model(folder):
        return folder
    raise ConfigError(
        f"no reward model in {folder} and none in reward_config.model ({config.model}); run --type REWARD first, "
        "or set reward_config.reward_fn"
    )


def encoder_class(config: Any) -> type[Encoder]:
    """What encodes the rows of an actor of this configuration."""
    return Seq2SeqEncoder if is_encoder_decoder(config) else Encoder


def block_count(config: ActorConfig, settings_of: Callable[..., Any] = read_model_config) -> int:
    """Blocks of the actor, without reading weights."""
    if config.model == TINY:
        return config.tiny.num_hidden_layers
    settings = settings_of(config.model, "actor_config.model", config).get_text_config()
    return int(settings.num_hidden_layers)


def pooling_for(backbone: nn.Module) -> str:
    """Where a reward model on this backbone is to be read; see `RewardModel`."""
    if is_encoder_decoder(backbone.config):
        return "start"
    return "last" if is_causal(backbone) else "first"


def _actor_tokenizer(config: ActorConfig, texts: list[str]) -> Any:
    key = "actor_config.tokenizer_path"
    if config.model == TINY and config.tokenizer_path is None:
        return train_tokenizer(texts, config.tiny.vocab_size)
    name, kwargs = config.tokenizer_path or config.model, hub_kwargs(config)
    return load_tokenizer(name, key, **kwargs)


def _actor_backbone(
    place: str,
    section: ActorConfig | RewardConfig,
    reward: RewardConfig,
    bits: dict[str, Any],
    adapters: PeftConfig | None,
) -> nn.Module:
    """A reward model's start from the actor: whole, or with the adapters that the actor has, to be trained on.

    Args:
        section: by which it is fetched.
        reward: by which it is trained.
    """
    key = "reward_config.model"
    if adapters is None or base_of(place) is None:
        return load_backbone(place, key, section, bits)
    policy = ready_for_adapters(load_base_model(place, key, section, bits), reward.gradient_checkpointing)
    continue_adapters(policy, Path(place))
    return backbone_with_adapters(policy)
