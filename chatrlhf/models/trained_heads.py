"""Reward models that are trained further from a head of their own: sequence classifiers, and what REWARD has left."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chatrlhf.config.model import PeftConfig
from chatrlhf.config.schema import Config, RewardConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS, OWN, Template, get_template, reward_template
from chatrlhf.data.text_pairs import TextPairEncoder, reads_pairs
from chatrlhf.errors import ConfigError
from chatrlhf.models.classifier_reward import reward_model_of
from chatrlhf.models.loading.adapter_loading import continue_adapters
from chatrlhf.models.loading.lora import add_adapters, base_of, has_adapters, where
from chatrlhf.models.loading.model_info import context_length
from chatrlhf.models.loading.pretrained import freeze_as_asked, hub_kwargs, match_vocabulary
from chatrlhf.models.loading.quantization import quantization_of, ready_for_adapters
from chatrlhf.models.loading.sequence_classifier import (
    is_classifier,
    load_sequence_classifier,
    refuse_labels,
    require_head,
)
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.models.reward_model import (
    RewardScorer,
    assembled,
    is_reward_model,
    read_backbone,
    read_base,
    saved_settings,
    scorer_class,
)
from chatrlhf.models.reward_network import RewardModel

KEY = "reward_config.model"
DROP = "set reward_config.fresh_head to True, which drops its head"


def has_head(section: RewardConfig) -> bool:
    """Whether REWARD starts from a model whose head is kept.

    Raises:
        ConfigError: the head cannot be kept.
    """
    name = section.model
    if section.fresh_head or name in (None, "actor", TINY):
        return False
    size = None
    if is_reward_model(name):
        settings = saved_settings(Path(name))
        size = settings["mlp_size"]
        if settings["pooling"] == "reply":
            raise ConfigError(f"{KEY}: {name!r} is the critic of an encoder-decoder, which reads no whole text; {DROP}")
    elif not is_classifier(name, KEY, section):
        return False
    else:
        require_head(name, KEY, section)
        refuse_labels(name, KEY, f"name another, or {DROP}", section)
    if section.model_head_hidden_size not in (None, size):
        raise ConfigError(
            f"reward_config.model_head_hidden_size: {section.model_head_hidden_size} is not the size of the head that "
            f"{name!r} brings; leave it out, or {DROP}"
        )
    return True


def trained_start(whole: Config, device: torch.device, adapters: PeftConfig | None) -> RewardScorer:
    """The reward model that `reward_config.model` names, with its head, ready to be trained; see `has_head`.

    Args:
        adapters: trained instead of the backbone's weights; those that the model has are trained further.

    Raises:
        ConfigError: it cannot be loaded, or its head cannot be kept.
    """
    config, name = whole.reward_config, str(whole.reward_config.model)
    tokenizer = load_tokenizer(config.tokenizer_path or name, "reward_config.tokenizer_path", **hub_kwargs(config))
    load = _from_folder if is_reward_model(name) else _from_classifier
    start = load(whole, tokenizer, adapters is not None)
    model = start.model
    if adapters is None:
        match_vocabulary(model.trunk, tokenizer, config, "reward_config")
        model.requires_grad_(True)
        freeze_as_asked(model.trunk, config)
    elif not has_adapters(model.trunk):
        ready_for_adapters(model.trunk, config.gradient_checkpointing)
        add_adapters(model.trunk, adapters, where(name), config.revision)
    template = start.template
    if config.template is not None or template is None:
        template = reward_template(whole, tokenizer)
    scorer, encoder_class = scorer_class(model, start.reads_pairs)
    max_length = min(config.max_sequence_length, context_length(model.backbone))
    encoder = encoder_class.of(tokenizer, template, max_length)
    if start.is_new and start.reads_pairs:
        model.separator = _separator(model, encoder, name)
    return scorer(model.to(device), encoder, head_from=name)


def classifier_scorer(name: str, key: str, keep_adapters: bool) -> RewardScorer:
    """A classifier in the form of a reward model, for a critic that starts from it.

    Args:
        keep_adapters: as of `load_sequence_classifier`.

    Raises:
        ConfigError: see `load_sequence_classifier`.
    """
    model = reward_model_of(load_sequence_classifier(name, key, keep_adapters=keep_adapters))
    encoder = Encoder(load_tokenizer(name, key), FORMATS["raw"], context_length(model.backbone))
    return RewardScorer(model, encoder, where(base_of(name) or name))


@dataclass
class _Start:
    """A model with its head, and how it reads texts where the configuration leaves that open."""

    model: RewardModel
    template: Template | None  # its own
    reads_pairs: bool
    is_new: bool  # as others saved it: how it counts token types is still to be found


def _from_folder(whole: Config, tokenizer: Any, apart: bool) -> _Start:
    config, folder = whole.reward_config, Path(str(whole.reward_config.model))
    settings, kwargs = saved_settings(folder), _kwargs(config)
    if apart and base_of(str(folder)) is not None:
        backbone = read_base(folder, settings, **kwargs)
        ready_for_adapters(backbone.base_model, config.gradient_checkpointing)
        continue_adapters(backbone.base_model, folder)
    else:
        backbone, _ = read_backbone(folder, settings, None, **kwargs)
    template = Template.load(folder) or FORMATS["raw"]
    return _Start(assembled(folder, settings, backbone), template, settings["reads_pairs"], False)


def _from_classifier(whole: Config, tokenizer: Any, apart: bool) -> _Start:
    config, name = whole.reward_config, str(whole.reward_config.model)
    bits = quantization_of(config, config.precision, "reward_config")
    model = reward_model_of(load_sequence_classifier(name, KEY, config, bits, apart))
    pairs = reads_pairs(tokenizer)
    # It reads as it does where no one trains it (`Classifier`).
    template = FORMATS["raw"] if pairs else None
    if tokenizer.chat_template:
        template = get_template(OWN, "reward_config.template", tokenizer, day=whole.day)
    return _Start(model, template, pairs, True)


def _kwargs(config: RewardConfig) -> dict[str, Any]:
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return attention | quantization_of(config, config.precision, "reward_config")


def _separator(model: RewardModel, encoder: TextPairEncoder, name: str) -> int | None:
    """What a classifier's token types are counted by; None where it has none."""
    takes_types = "token_type_ids" in inspect.signature(model.backbone.forward).parameters
    if not takes_types or getattr(model.config, "type_vocab_size", 2) < 2:
        return None
    try:
        return encoder.separator()
    except ValueError as error:
        raise ConfigError(
            f"{KEY}: {name!r} cannot be trained further with its own head: its tokenizer gives {error}, which a row of "
            f"ids does not tell; use it without data, or {DROP}"
        ) from None
