"""Models and their configurations from a folder or from the hub, by the keys that say how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from chatrlhf.config.schema import ActorConfig, RewardConfig
from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing
from chatrlhf.models.loading.adapter_merging import merged
from chatrlhf.models.loading.backbone import backbone_of, head_stays_apart, language_model_class
from chatrlhf.models.loading.config_sizes import check_file, check_sizes
from chatrlhf.models.loading.generation_config import adopt_generation_config, check_generation_config
from chatrlhf.models.loading.loading_report import UNUSED_BY_BACKBONES, explained, load_pretrained
from chatrlhf.models.loading.lora import base_of, config_of, revision_of_base
from chatrlhf.models.loading.quantization import how_quantized, never_repack
from chatrlhf.models.loading.rope import stretch_positions
from chatrlhf.models.loading.safe_config import auto_config
from chatrlhf.runtime.whole_folders import require_whole


def read_model_config(name: str, key: str, section: ActorConfig | RewardConfig | None = None) -> Any:
    """A model's configuration file (of adapters their base's), its positions stretched as the section asks.

    Raises:
        ConfigError: there is none, or nothing in it to stretch; it names the key.
        WeightsError: a run has left the folder, and it is not what it was.
    """
    require_whole(name)
    place = config_of(name)
    kwargs = hub_kwargs(section) | revision_of_base(name)
    holder = key if base_of(name) is None else f"{key}: the base of the adapters in {name}"
    check_file(key, place)
    with explained(holder, place, kwargs.get("revision")):
        settings = auto_config(place, **kwargs)
    with doing(f"{key}: reading the configuration of", name, untrusted=True):
        check_sizes(settings, key, place)
        leave_router_logits(settings)
    if section is not None and section.rope_scaling is not None:
        stretch_positions(settings, section.rope_scaling, f"{key.rpartition('.')[0]}.rope_scaling")
    return settings


def leave_router_logits(settings: Any) -> None:
    """A mixture of experts gives its router's logits only where a trainer asks for them: TRL does, and leaves it so.

    They are of no use to a rollout, whose mask transformers' loss on them cannot read.
    """
    text = settings.get_text_config()
    if getattr(text, "output_router_logits", False):
        text.output_router_logits = False


def hub_kwargs(config: ActorConfig | RewardConfig | None) -> dict[str, Any]:
    """How a section's model is to be fetched."""
    if config is None:
        return {"trust_remote_code": False}
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
        return backbone_of(load_language_model(name, key, section))
    return _from_pretrained(AutoModel, name, key, read_model_config(name, key, section), section, bits)


def load_language_model(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, bits: dict[str, Any] | None = None
) -> nn.Module:
    """A model with its head, adapters merged. Raises ConfigError as `load_backbone` does."""
    if base_of(name) is not None:
        return merged(load_base_model(name, key, section), name)
    settings = read_model_config(name, key, section)
    return _from_pretrained(language_model_class(settings), name, key, settings, section, bits)


def load_base_model(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, bits: dict[str, Any] | None = None
) -> nn.Module:
    """What the adapters in a folder belong to, in the revision and with the positions that it had then."""
    base = str(base_of(name))
    if base_of(base) is not None:
        model = load_language_model(base, key, section)
    else:
        settings = read_model_config(name, key, section)
        fetched = (bits or {}) | revision_of_base(name)
        kind, of_base = language_model_class(settings), f"{key}: the base of the adapters in {name}"
        model = _from_pretrained(kind, base, of_base, settings, section, fetched)
    adopt_generation_config(model, Path(name))
    return model


def _from_pretrained(
    auto: Any,
    name: str,
    key: str,
    settings: Any,
    section: ActorConfig | RewardConfig | None,
    bits: dict[str, Any] | None = None,
) -> nn.Module:
    """A model made by the given configuration, in float32 but for quantized weights."""
    kwargs = {"config": settings, **hub_kwargs(section), **(bits or {})}
    if auto is not AutoModel:
        check_generation_config(name, key, kwargs.get("revision"))
    if section is not None and section.attn_implementation is not None:
        kwargs["attn_implementation"] = section.attn_implementation
    # What only a head reads, a model without one may lack.
    fresh = UNUSED_BY_BACKBONES if auto is AutoModel else ()
    with doing(f"{key}: loading", name, untrusted=True):
        return never_repack(load_pretrained(auto, name, key, fresh, dtype=torch.float32, **kwargs))


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """A model on a device. Quantized weights were put in their place when they were loaded, and cannot be moved."""
    return model if how_quantized(model) else model.to(device)


def as_held(section: Any) -> Any:
    """A section for a folder that this package wrote: what says how to fetch and stretch a model was done."""
    done = {"revision": None, "rope_scaling": None}
    return section.model_copy(update=done) if section is not None else None


def freeze_as_asked(model: nn.Module, section: ActorConfig | RewardConfig) -> nn.Module:
    """The model, its embeddings out of training by `froze_embeddings`."""
    if section.froze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    return model


def match_vocabulary(model: nn.Module, tokenizer: Any, section: ActorConfig | RewardConfig, name: str) -> None:
    """Rows for tokens that a model has no embeddings of, where they are asked for.

    Raises:
        ConfigError: there are such tokens, and no one asked.
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
