"""Low-rank adapters (Hu et al. 2021, "LoRA") that are trained in the place of a policy's own weights.

The adapters lie inside the model's linear layers, and the model stays what it was: what samples, scores or saves it
calls it as it calls any other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.config.schema import PeftConfig
from chatrlhf.errors import ConfigError

ADAPTER_CONFIG = "adapter_config.json"
KEY = "actor_config.peft_config_path"


def add_adapters(policy: nn.Module, settings: PeftConfig, base: str, revision: str | None = None) -> None:
    """Freeze a policy and add adapters that change nothing yet (their second factor is 0).

    Args:
        base: folder or hub id of the policy's weights as they are now; written beside the adapters when they are saved.

    Raises:
        ConfigError: there are no layers of the names that the settings give.
    """
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
    from transformers.pytorch_utils import Conv1D

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules or USUAL.get(policy.config.model_type, "all-linear"),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in policy.modules()),  # GPT-2's weights lie transposed
        revision=revision,
    )
    training = policy.training
    try:
        policy.add_adapter(config)  # which freezes all else
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{KEY}: no adapters for target_modules {settings.target_modules!r} ({reason})") from None
    config.base_model_name_or_path = base
    policy.train(training)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters inside."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


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
    return str(beside) if not Path(base).exists() and beside.exists() else base


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
            added = layers[owner].get_delta_weight("default") if rest == "weight" else 0
            yield f"{owner}.{rest}", value + added
        elif ".lora_" not in name:
            yield name, value


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
