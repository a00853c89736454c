"""Models by name: made on the spot (`tiny`), from a folder, or from the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM

from chatrlhf.config.peft import PeftConfig
from chatrlhf.config.rope import RopeScaling
from chatrlhf.config.schema import ActorConfig, Config, RewardConfig, TinyConfig
from chatrlhf.data.collate import Encoder
from chatrlhf.data.pairs import PairEncoder
from chatrlhf.data.templates import Template, get_template
from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.models.adapters import (
    add_adapters,
    backbone_with_adapters,
    base_of,
    config_of,
    go_on_with_adapters,
    has_adapters,
    merged,
    revision_of,
    where,
)
from chatrlhf.models.backbone import backbone_of, head_stays_apart, is_encoder_decoder, language_model_class
from chatrlhf.models.meta_files import how_to_convert
from chatrlhf.models.quantization import how_quantized, never_repack, quantization_of, ready_for_adapters
from chatrlhf.models.reward_model import SETTINGS, RewardModel, RewardScorer, load_reward_model
from chatrlhf.models.rope import positions, stretch_positions
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import is_causal
from chatrlhf.models.sharing import Base
from chatrlhf.models.tokenizer import load_tokenizer, train_tokenizer

TINY = "tiny"


def load_actor(
    config: ActorConfig, texts: list[str], device: torch.device, precision: str | None = None
) -> tuple[nn.Module, Any]:
    """The model that `actor_config.model` names, in float32 or in few bits, and its tokenizer.

    Args:
        texts: what the tokenizer of `model: tiny` is trained on.
        precision: that the stage computes in; None: the weights are to be whole, whatever the configuration says.

    Raises:
        ConfigError: it cannot be loaded; the reason is given.
    """
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        model = tiny_model(config.tiny, tokenizer, config.rope_scaling)
    else:
        bits = quantization_of(config, precision, "actor_config") if precision else {}
        model = _language_model(config.model, "actor_config.model", config, bits)
        _match_vocabulary(model, tokenizer, config, "actor_config")
    return placed(_freeze_as_asked(model, config), device), tokenizer


def load_base(
    config: ActorConfig, texts: list[str], device: torch.device, precision: str | None = None
) -> tuple[nn.Module, Any]:
    """As `load_actor`, of adapters in `actor_config.model` what they belong to, with the positions it had then."""
    key = "actor_config.model"
    bits = quantization_of(config, precision, "actor_config") if precision else {}
    model = _base_model(config.model, key, config, bits)
    return placed(model, device), _actor_tokenizer(config, texts)


def tokenizer_and_settings(config: ActorConfig, texts: list[str]) -> tuple[Any, Any]:
    """The actor's tokenizer and its model's configuration, without reading weights."""
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        return tokenizer, _tiny_config(config.tiny, tokenizer, config.rope_scaling)
    return tokenizer, read_model_config(config.model, "actor_config.model", config)


def read_model_config(name: str, key: str, section: ActorConfig | RewardConfig | None = None) -> Any:
    """A model's configuration file (of adapters their base's), its positions stretched as the section asks.

    Raises:
        ConfigError: there is none, or nothing in it to stretch; it names the key.
    """
    place = config_of(name)
    settings = _explained(key, place, lambda: AutoConfig.from_pretrained(place, **hub_kwargs(section)))
    if section is not None and section.rope_scaling is not None:
        stretch_positions(settings, section.rope_scaling, f"{key.rpartition('.')[0]}.rope_scaling")
    return settings


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
            ``precision`` weights in few bits under adapters.
    """
    key = "actor_config.model"
    if apart and base_of(str(folder)) is not None:
        bits = quantization_of(section, precision, "actor_config") if section and precision else {}
        model = ready_for_adapters(_base_model(str(folder), key, _as_held(section), bits))
        go_on_with_adapters(model, folder)
    else:
        model = _language_model(str(folder), key, _as_held(section))
        if section is not None:
            _freeze_as_asked(model, section)
    return placed(model, device), load_tokenizer(str(folder), key), Template.load(folder)


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """A model on a device. What lies in few bits was put in its place when it was loaded, and cannot be moved."""
    return model if how_quantized(model) else model.to(device)


def new_reward_model(
    whole: Config, actor_folder: Path | None, texts: list[str], device: torch.device, adapters: PeftConfig | None = None
) -> RewardScorer:
    """A reward model ready to be trained: the backbone of `reward_config.model` under a fresh head.

    Args:
        whole: what its reward_config leaves open is the actor's.
        actor_folder: the fine-tuned actor, for `model: actor`; None where there is none, and then the actor's
            own starting point is taken.
        texts: what the tokenizer of `model: tiny` is trained on.
        adapters: trained in the place of the backbone's weights; those that the fine-tuned actor has go on.
    """
    config, actor = whole.reward_config, whole.actor_config
    name, key = config.model, "reward_config.model"
    template = None
    bits = quantization_of(config, config.precision, "reward_config")
    if name == "actor" and actor_folder is not None:
        place = str(actor_folder)
        backbone = _actor_backbone(place, _as_held(config), config, bits, adapters)
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
        place, revision, backbone = name, config.revision, load_backbone(name, key, config, bits)
        tokenizer = load_tokenizer(config.tokenizer_path or name, "reward_config.tokenizer_path", **hub_kwargs(config))
        _match_vocabulary(backbone, tokenizer, config, "reward_config")
    pooling = pooling_for(backbone)
    head = ScalarHead(state_size(backbone), config.model_head_hidden_size)
    max_length = min(config.max_sequence_length, context_length(backbone))
    if adapters is None:
        _freeze_as_asked(backbone, config)
    elif not has_adapters(backbone):
        backbone = ready_for_adapters(backbone, config.gradient_checkpointing)
        add_adapters(backbone, adapters, where(place), revision)
    model = RewardModel(backbone, head, pooling).to(device)
    if template is None:
        name = config.template or actor.template
        template = get_template(name, "reward_config.template", tokenizer, whole.base_dir)
    return RewardScorer(model, Encoder.of(tokenizer, template, max_length))


def trained_reward_model(
    folder: Path, config: RewardConfig, device: torch.device, base: Base | None = None
) -> RewardScorer:
    """The reward model of an earlier REWARD stage, or the folder that `reward_config.model` names; nobody trains it.

    Args:
        base: weights in memory that its adapters may stand upon.
    """
    scorer = load_reward_model(require_reward_model(folder, config), device, base)
    scorer.model.requires_grad_(False)
    return scorer


def require_reward_model(folder: Path, config: RewardConfig) -> Path:
    """The folder of `trained_reward_model`. Raises ConfigError where there is none."""
    if config.model and (Path(config.model) / SETTINGS).exists():
        return Path(config.model)  # named outright
    if (folder / SETTINGS).exists():
        return folder
    raise ConfigError(
        f"no reward model in {folder} and none in reward_config.model ({config.model}); run --type REWARD first, "
        "or set reward_config.reward_fn"
    )


def encoder_class(config: Any) -> type[Encoder]:
    """What encodes the rows of an actor of this configuration."""
    return PairEncoder if is_encoder_decoder(config) else Encoder


def context_length(model: nn.Module) -> int:
    """Positions a model can take; a large number for models without a bound (ALiBi)."""
    return positions(model.config)


def fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters' names, shapes and which are frozen: equal for models that can exchange states."""
    shapes = sorted(
        (name, list(parameter.shape) + ([] if parameter.requires_grad else ["frozen"]))
        for name, parameter in model.named_parameters()
    )
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_count(model: nn.Module) -> int:
    """Parameters that are trained, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def block_count(config: ActorConfig, settings_of: Callable[..., Any] = read_model_config) -> int:
    """Blocks of the actor, without reading weights."""
    if config.model == TINY:
        return config.tiny.num_hidden_layers
    settings = settings_of(config.model, "actor_config.model", config).get_text_config()
    return int(settings.num_hidden_layers)


def tiny_model(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None = None) -> nn.Module:
    """A small Llama for a tokenizer, with random weights from torch's generator."""
    return LlamaForCausalLM(_tiny_config(config, tokenizer, scaling))


def _tiny_config(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None) -> LlamaConfig:
    intermediate = config.intermediate_size or -(-config.hidden_size * 8 // 3 // 32) * 32
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if scaling is not None:
        stretch_positions(settings, scaling, "actor_config.rope_scaling")
    return settings


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


def hub_kwargs(config: ActorConfig | RewardConfig | None) -> dict[str, Any]:
    """How a section's model is to be fetched."""
    if config is None:
        return {}
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return kwargs | ({"revision": config.revision} if config.revision else {})


def load_backbone(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, bits: dict[str, Any] | None = None
) -> nn.Module:
    """A model without its head, adapters merged.

    Raises:
        ConfigError: it cannot be loaded; the reason is given.
    """
    if base_of(name) is not None:
        return backbone_of(_language_model(name, key, section))
    return _from_pretrained(AutoModel, name, key, read_model_config(name, key, section), section, bits)


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
    policy = ready_for_adapters(_base_model(place, key, section, bits), reward.gradient_checkpointing)
    go_on_with_adapters(policy, Path(place))
    return backbone_with_adapters(policy)


def _language_model(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, bits: dict[str, Any] | None = None
) -> nn.Module:
    if base_of(name) is not None:
        return merged(_base_model(name, key, section), name)
    settings = read_model_config(name, key, section)
    return _from_pretrained(language_model_class(settings), name, key, settings, section, bits)


def _base_model(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, bits: dict[str, Any] | None = None
) -> nn.Module:
    """What the adapters in a folder belong to, in the revision and with the positions that it had then."""
    base = str(base_of(name))
    if base_of(base) is not None:
        return _language_model(base, key, section)
    settings = read_model_config(name, key, section)
    revision = {"revision": revision_of(name)} if revision_of(name) else {}
    return _from_pretrained(language_model_class(settings), base, key, settings, section, (bits or {}) | revision)


def _from_pretrained(
    auto: Any,
    name: str,
    key: str,
    settings: Any,
    section: ActorConfig | RewardConfig | None,
    bits: dict[str, Any] | None = None,
) -> nn.Module:
    """A model made by the given configuration, in float32 but for what lies in few bits."""
    kwargs = {"config": settings, **hub_kwargs(section), **(bits or {})}
    if section is not None and section.attn_implementation is not None:
        kwargs["attn_implementation"] = section.attn_implementation
    return never_repack(_explained(key, name, lambda: auto.from_pretrained(name, dtype=torch.float32, **kwargs)))


def _as_held(section: Any) -> Any:
    """A section for a folder that this package wrote: what says how to fetch and stretch a model was done."""
    done = {"revision": None, "rope_scaling": None}
    return section.model_copy(update=done) if section is not None else None


def _freeze_as_asked(model: nn.Module, section: ActorConfig | RewardConfig) -> nn.Module:
    if section.froze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def _explained(key: str, name: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, or an error that names the key."""
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError) as error:
        if (command := how_to_convert(name)) is not None:
            raise ConfigError(
                f"{key}: {name!r} holds Meta's original LLaMA files; convert them first: {command}"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "a folder without a usable model" if Path(name).is_dir() else "no folder here and not on the hub"
        missing = isinstance(error, OSError) and not Path(name).exists()
        refusal = MissingError if missing else ConfigError
        raise refusal(f"{key}: {name!r} cannot be loaded, it is {kind} ({reason})") from None


def _match_vocabulary(model: nn.Module, tokenizer: Any, section: ActorConfig | RewardConfig, name: str) -> None:
    """Rows for tokens that a model has no embeddings of, where they are asked for.

    Raises:
        ConfigError: there are such tokens, and nobody asked.
    """
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= rows:
        return
    if not section.resize_embeddings:
        raise ConfigError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings; name the "
            "tokenizer that belongs to the model, or set resize_embeddings to True, and the model gets the rest"
        )
    # Each new row is drawn around the mean of the old ones (Hewitt 2021), transformers' usual way.
    with head_stays_apart(model):
        model.resize_token_embeddings(len(tokenizer))
