"""Sequence classifiers with one label: reward models as transformers, TRL and peft save them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification

from chatrlhf.config.schema import RewardConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.adapters import ADAPTER_CONFIG, backbone_with_adapters, base_of, revision_of_base, where
from chatrlhf.models.loading import hub_kwargs, load_backbone, read_model_config
from chatrlhf.models.loading_report import explained, load_reported
from chatrlhf.models.quantization import never_repack

TASK = "SEQ_CLS"  # what peft calls a sequence classifier
PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")  # peft's types without weights
PREFIX = "base_model.model."  # of peft's names for its weights


def is_classifier(name: str, key: str, section: RewardConfig | None = None) -> bool:
    """Whether a folder or a hub id holds a sequence classifier, or adapters of one.

    Raises:
        ConfigError: it has no configuration; the key is named.
    """
    if base_of(name) is not None and (task := _adapter_config(name).get("task_type")) is not None:
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
    if base_of(name) is not None and _adapter_config(name).get("task_type") == TASK:
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
    return tuple(f"{module}." for module in head_modules(_outline(settings, trust_remote_code)))


def leave_head_whole(settings: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """How a classifier is to be loaded, its head not quantized where the rest is."""
    if "quantization_config" in kwargs:
        outline = _outline(settings, kwargs.get("trust_remote_code", False))
        kwargs["quantization_config"].llm_int8_skip_modules = list(head_modules(outline))
    return kwargs


def _outline(settings: Any, trust_remote_code: bool) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(settings, trust_remote_code=trust_remote_code)


def _saved_names(folder: Path) -> list[str]:
    """The names of the weights in a folder's safetensors files; none where it has other files or is on the hub."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    whole = folder / "model.safetensors"
    return list(_shapes(whole)) if whole.exists() else []


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shapes of the weights in a safetensors file, which are read without the weights."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return {name: file.get_slice(name).get_shape() for name in names}


def _without(name: str, key: str, weights: list[str]) -> ConfigError:
    return ConfigError(
        f"{key}: {name!r} is a classifier without {', '.join(weights[:3])}: these weights are in none of its files and "
        "would be random; name the folder that holds them, or a model without a head of its own"
    )


def _adapter_config(name: str) -> dict[str, Any]:
    return json.loads((Path(name) / ADAPTER_CONFIG).read_text(encoding="utf-8"))


def _adapter_shapes(name: str) -> dict[str, list[int]]:
    from peft.utils.save_and_load import load_peft_weights

    path = Path(name) / "adapter_model.safetensors"
    if path.exists():
        return _shapes(path)
    return {key: list(weight.shape) for key, weight in load_peft_weights(name, device="cpu").items()}


def _saved_head(name: str) -> dict[str, list[int]]:
    """The shapes of what adapters of a classifier hold whole: its head."""
    whole = set(_adapter_config(name).get("modules_to_save") or [])
    return {key: shape for key, shape in _adapter_shapes(name).items() if whole & set(key.split("."))}


def _add_adapters(model: nn.Module, name: str, key: str, keep: bool) -> set[str]:
    """Add a folder's adapters to a classifier in place, and give it the head that is saved with them.

    Returns:
        The names of the weights that the folder holds whole.
    """
    from peft import PeftModel, get_peft_model_state_dict

    kind = _adapter_config(name)["peft_type"]
    if kind in PROMPTS:
        raise ConfigError(
            f"{key}: the adapters in {name!r} are of type {kind}, learned prompts that are part of no weight; name a "
            "classifier with adapters such as LORA, or a whole one"
        )
    if keep and kind != "LORA":
        raise ConfigError(
            f"{key}: the adapters in {name!r} are of type {kind}, and adapters that are trained further must be of "
            "type LORA; set reward_config.peft_enable to False, and they are merged and all weights are trained"
        )
    with explained(key, name):
        wrapped = PeftModel.from_pretrained(model, name, is_trainable=keep)
    expected = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    if absent := sorted(expected.keys() - _adapter_shapes(name).keys()):
        raise ConfigError(
            f"{key}: the adapters in {name!r} lack {', '.join(absent[:3])}, and these weights would be random; save "
            "them again with all that was trained"
        )
    if keep:
        _lay_bare(model, wrapped, str(base_of(name)))
    else:
        wrapped.merge_and_unload()
        model.requires_grad_(True)
    return {weight.removeprefix(PREFIX) for weight in _saved_head(name)}


def _lay_bare(model: nn.Module, wrapped: Any, base: str) -> None:
    """Leave adapters in a classifier's backbone, and of its head the copy that was trained."""
    from peft.utils import ModulesToSaveWrapper

    for child, module in list(model.named_children()):
        if isinstance(module, ModulesToSaveWrapper):
            setattr(model, child, module.modules_to_save[wrapped.active_adapter])
    model.peft_config = wrapped.peft_config
    for config in backbone_with_adapters(model).peft_config.values():
        config.modules_to_save, config.base_model_name_or_path = None, where(base)
    del model.peft_config
