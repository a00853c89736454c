"""Low-rank adapters (Hu et al. 2021, "LoRA") that are trained in the place of a policy's own weights.

The adapters lie inside the model's linear layers, and the model stays what it was: what samples, scores or saves it
calls it as it calls any other. Where RL goes on with the adapters of the fine-tuned actor they lie there twice, to be
trained and as they were: switching them off would give the base, which is not what RL is held to.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.config.peft import PeftConfig
from chatrlhf.errors import ConfigError

ADAPTER_CONFIG, MODEL_CARD = "adapter_config.json", "README.md"
# What the configuration of their base was. Not "config.json": transformers would look for whole weights beside it.
BASE_CONFIG = "base_config.json"
POLICY, REFERENCE = "default", "reference"  # names of adapters; peft knows the first one
KEY = "actor_config.peft_config_path"


def add_adapters(policy: nn.Module, settings: PeftConfig, base: str, revision: str | None = None) -> None:
    """Freeze a policy and add adapters that change nothing yet (their second factor is 0).

    Args:
        base: folder or hub id of the policy's weights as they are now; written beside the adapters when they are saved.

    Raises:
        ConfigError: there are no layers of the names that the settings give.
    """
    config = _lora_config(policy, settings, revision)
    training = policy.training
    with _explained(settings):
        policy.add_adapter(config)  # which freezes all else
    config.base_model_name_or_path = base
    policy.train(training)


def with_adapters(model: nn.Module, settings: PeftConfig, base: str, revision: str | None = None) -> nn.Module:
    """The same for a stage on TRL's trainers, which know such a model when peft has wrapped it.

    Raises:
        ConfigError: as `add_adapters`.
    """
    from peft import get_peft_model

    config = _lora_config(model, settings, revision)
    with _explained(settings):
        wrapped = get_peft_model(model, config)
    config.base_model_name_or_path = base
    return wrapped


def go_on_with_adapters(base: nn.Module, folder: Path) -> None:
    """Give a model the adapters of a folder twice, to be trained, and as they are, for its reference."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # there are to be two
        for name in (POLICY, REFERENCE):
            base.load_adapter(str(folder), adapter_name=name)
    base.set_adapter(POLICY)
    for name, weight in base.named_parameters():
        weight.requires_grad_(".lora_" in name and f".{POLICY}." in name)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters inside."""
    return bool(getattr(model, "peft_config", None))


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Inside, a policy with adapters computes as it did before RL: with those it started from, or with none."""
    if REFERENCE not in model.peft_config:
        with without_adapters(model):
            yield
        return
    model.set_adapter(REFERENCE)
    try:
        yield
    finally:
        model.set_adapter(POLICY)


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as if it had none."""
    layers = _adapted(model)
    for layer in layers.values():
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.enable_adapters(True)


def save_policy(model: nn.Module, folder: Path) -> None:
    """Save a policy whole, or its adapters in peft's format, with the configuration that their base is to have."""
    model.save_pretrained(folder)
    if has_adapters(model):
        settings = copy.deepcopy(model.config)
        if hasattr(settings, "quantization_config"):  # how it was held in memory, not what it is
            del settings.quantization_config
        settings.to_json_file(folder / BASE_CONFIG)
        (folder / MODEL_CARD).unlink(missing_ok=True)  # an empty form


@torch.no_grad()
def whole_copy(model: nn.Module) -> nn.Module:
    """A copy with what adapters add to its weights, and none left."""
    copied = copy.deepcopy(model)
    for name, layer in _adapted(copied).items():
        layer.merge(adapter_names=[POLICY])
        parent, _, child = name.rpartition(".")
        setattr(copied.get_submodule(parent), child, layer.get_base_layer())
    return copied.requires_grad_(True)


@torch.no_grad()
def save_plain(model: nn.Module, folder: Path) -> None:
    """Save a model's weights with what its adapters add to them; one without adapters as it is."""
    if _adapted(model):
        model.save_pretrained(folder, state_dict=dict(_merged(model, model.state_dict().items())))
    else:
        model.save_pretrained(folder)


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by the names they have without adapters, with what its adapters add; one at a time."""
    return _merged(model, model.named_parameters())


def base_of(name: str) -> str | None:
    """Where the weights are that the adapters in a folder belong to; None where the folder holds no adapters.

    A run's folder may have been moved: its fine-tuned actor is then looked for beside the adapters.
    """
    path = Path(name) / ADAPTER_CONFIG
    if not path.exists():
        return None
    base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    beside = Path(name).resolve().parent / "actor"
    is_whole = beside.exists() and not (beside / ADAPTER_CONFIG).exists()
    return str(beside) if not Path(base).exists() and is_whole else base


def config_of(name: str) -> str:
    """Where the configuration is that a model, or the base of a folder's adapters, is made by."""
    base = base_of(name)
    beside = Path(name) / BASE_CONFIG
    return name if base is None else str(beside) if beside.exists() else base


def merged(model: nn.Module, folder: str) -> nn.Module:
    """A model with the adapters of a folder added to its weights; no adapter is left, and all of it can be trained."""
    from peft import PeftModel

    # peft has frozen what the adapters were added to.
    return PeftModel.from_pretrained(model, folder).merge_and_unload().requires_grad_(True)


@torch.no_grad()
def _merged(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    layers = _adapted(model)
    for name, value in weights:
        owner, _, rest = name.partition(".base_layer.")
        if rest:
            added = layers[owner].get_delta_weight(POLICY) if rest == "weight" else 0
            yield f"{owner}.{rest}", value + added
        elif ".lora_" not in name:
            yield name, value


def _lora_config(model: nn.Module, settings: PeftConfig, revision: str | None) -> Any:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules or USUAL.get(model.config.model_type, "all-linear"),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights lie transposed
        revision=revision,
    )


@contextmanager
def _explained(settings: PeftConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{KEY}: no adapters for target_modules {settings.target_modules!r} ({reason})") from None


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
