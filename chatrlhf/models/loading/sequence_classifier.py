"""Sequence classifiers with one label: reward models as transformers, TRL and peft save them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from chatrlhf.config.schema import RewardConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.adapter_loading import wrapped
from chatrlhf.models.loading.loading_report import load_reported
from chatrlhf.models.loading.lora import adapter_settings, backbone_with_adapters, base_of, revision_of_base, where
from chatrlhf.models.loading.pretrained import hub_kwargs, load_backbone, read_model_config
from chatrlhf.models.loading.quantization import never_repack
from chatrlhf.models.loading.weight_files import ADAPTER_FILES, headers, weight_files

TASK = "SEQ_CLS"  # what peft calls a sequence classifier
PREFIX = "base_model.model."  # of peft's names for its weights


def is_classifier(name: str, key: str, section: RewardConfig | None = None) -> bool:
    """Whether a folder or a hub id holds a sequence classifier, or adapters of one.

    Raises:
        ConfigError: it has no configuration; the key is named.
    """
    if base_of(name) is not None and (task := _settings_of(name).get("task_type")) is not None:
        return task == TASK
    architectures = read_model_config(name, key, section).architectures
    return any(each.endswith("ForSequenceClassification") for each in architectures or [])


def label_count(name: str, settings: Any) -> int:
    """The labels of a classifier.

    Args:
        settings: its configuration. That of adapters is their base's and often knows of no label.
    """
    if base_of(name) is None:
        return settings.num_labels
    # The last layer of a head gives the labels; what lies before it is as wide as the model.
    rows = [shape[0] for shape in _saved_head(name).values() if len(shape) == 2]
    return min(rows, default=settings.num_labels)


def refuse_labels(name: str, key: str, remedy: str, section: RewardConfig | None = None) -> None:
    """A ConfigError where a classifier has several labels: none of them is known to be the score."""
    labels = label_count(name, read_model_config(name, key, section))
    if labels != 1:
        raise ConfigError(f"{key}: {name!r} is a classifier with {labels} labels, a reward model has one; {remedy}")


def require_head(name: str, key: str, section: RewardConfig | None = None) -> None:
    """A ConfigError where a folder says that it holds a classifier and holds no head; its weights are not read."""
    if base_of(name) is not None:
        names = [weight.removeprefix(PREFIX) for weight in _saved_head(name)] or ["no weight of a head"]
    else:
        names = _saved_names(Path(name))
    if not names:
        return
    trusted = section is not None and section.trust_remote_code
    heads = head_names(read_model_config(name, key, section), trusted)
    if not any(each.startswith(heads) for each in names):
        raise _without(name, key, [f"{heads[0]}weight"])


def load_sequence_classifier(
    name: str,
    key: str,
    section: RewardConfig | None = None,
    bits: dict[str, Any] | None = None,
    keep_adapters: bool = False,
) -> nn.Module:
    """A classifier, in float32 or quantized.

    Args:
        keep_adapters: adapters are not merged but stay, in the model without its head, to be trained further.

    Raises:
        ConfigError: it cannot be loaded, or a part of it is in no file and would be random.
    """
    settings = read_model_config(name, key, section)
    settings.num_labels = label_count(name, settings)
    base = base_of(name)
    kwargs = {"config": settings, **hub_kwargs(section), **revision_of_base(name), **(bits or {})}
    kwargs = leave_head_whole(settings, kwargs)
    if section is not None and section.attn_implementation is not None:
        kwargs["attn_implementation"] = section.attn_implementation
    auto, place = AutoModelForSequenceClassification, base or name
    fresh = head_names(settings, kwargs.get("trust_remote_code", False)) if base is not None else ()
    model, absent = load_reported(auto, place, key, fresh, dtype=torch.float32, **kwargs)
    never_repack(model)
    if base is not None:
        absent -= _add_adapters(model, name, key, keep_adapters)
    if absent:
        raise _without(name, key, sorted(absent))
    return model


def load_trunk(name: str, key: str, section: RewardConfig, bits: dict[str, Any]) -> nn.Module:
    """A model without its head, adapters merged, also where these are a classifier's. Raises ConfigError."""
    if base_of(name) is not None and _settings_of(name).get("task_type") == TASK:
        return load_sequence_classifier(name, key, section).base_model
    return load_backbone(name, key, section, bits)


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The parts of a classifier that are not its backbone and have weights, by name."""
    return {
        name: module
        for name, module in model.named_children()
        if module is not model.base_model and any(True for _ in module.parameters())
    }


def head_names(settings: Any, trust_remote_code: bool = False) -> tuple[str, ...]:
    """How the names of a classifier's head begin."""
    return tuple(f"{module}." for module in head_modules(_meta_classifier(settings, trust_remote_code)))


def leave_head_whole(settings: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """How a classifier is to be loaded, its head not quantized where the rest is."""
    if "quantization_config" in kwargs:
        outline = _meta_classifier(settings, kwargs.get("trust_remote_code", False))
        kwargs["quantization_config"].llm_int8_skip_modules = list(head_modules(outline))
    return kwargs


def _meta_classifier(settings: Any, trust_remote_code: bool) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(settings, trust_remote_code=trust_remote_code)


def _saved_names(folder: Path) -> list[str]:
    """The names of the weights in a folder's files; none where it is on the hub."""
    return [name for path in weight_files(folder) for name in headers(path)] if folder.is_dir() else []


def _without(name: str, key: str, weights: list[str]) -> ConfigError:
    return ConfigError(
        f"{key}: {name!r} is a classifier without {', '.join(weights[:3])}: these weights are in none of its files and "
        "would be random; name the folder that holds them, or a model without a head of its own"
    )


def _settings_of(name: str) -> dict[str, Any]:
    """What a folder says of the adapters that it holds."""
    return adapter_settings(name) or {}


def _adapter_shapes(name: str) -> dict[str, tuple[int, ...]]:
    held = [headers(path) for path in weight_files(Path(name), ADAPTER_FILES)]
    return {tensor: header.shape for each in held for tensor, header in each.items()}


def _saved_head(name: str) -> dict[str, tuple[int, ...]]:
    """The shapes of what adapters of a classifier hold whole: its head."""
    whole = set(_settings_of(name).get("modules_to_save") or [])
    return {key: shape for key, shape in _adapter_shapes(name).items() if whole & set(key.split("."))}


def _add_adapters(model: nn.Module, name: str, key: str, keep: bool) -> set[str]:
    """Add a folder's adapters to a classifier in place, and give it the head that is saved with them.

    Returns:
        The names of the weights that the folder holds whole.
    """
    kind = _settings_of(name).get("peft_type")
    if keep and kind != "LORA":
        raise ConfigError(
            f"{key}: the adapters in {name!r} are of type {kind}, and adapters that are trained further must be of "
            "type LORA; set reward_config.peft_enable to False, and they are merged and all weights are trained"
        )
    adapted = wrapped(model, name, is_trainable=keep)
    if keep:
        _strip_head(model, adapted, str(base_of(name)))
    else:
        adapted.merge_and_unload()
        model.requires_grad_(True)
    return {weight.removeprefix(PREFIX) for weight in _saved_head(name)}


def _strip_head(model: nn.Module, adapted: Any, base: str) -> None:
    """Leave adapters in a classifier's backbone, and of its head the copy that was trained."""
    from peft.utils import ModulesToSaveWrapper

    for child, module in list(model.named_children()):
        if isinstance(module, ModulesToSaveWrapper):
            setattr(model, child, module.modules_to_save[adapted.active_adapter])
    model.peft_config = adapted.peft_config
    for config in backbone_with_adapters(model).peft_config.values():
        config.modules_to_save, config.base_model_name_or_path = None, where(base)
    del model.peft_config
