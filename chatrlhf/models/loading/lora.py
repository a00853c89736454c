"""Low-rank adapters (Hu et al. 2021, "LoRA") that are trained instead of a model's own weights.

The adapters lie inside the model's linear layers, and the model stays what it was: what samples, scores or saves it
calls it as it calls any other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.compat import mark_adapters
from chatrlhf.config.model import PeftConfig
from chatrlhf.config.strict_json import load_settings
from chatrlhf.errors import ConfigError, WeightsError
from chatrlhf.models.loading.backbone import backbone_of, is_encoder_decoder

ADAPTER_CONFIG, MODEL_CARD = "adapter_config.json", "README.md"
# What the configuration of their base was. Not "config.json": transformers would look for whole weights beside it.
BASE_CONFIG = "base_config.json"
BACKBONE = "FEATURE_EXTRACTION"  # what peft calls a model without a head
TRAINED = "default"  # the name that peft gives
KEY = "actor_config.peft_config_path"


def add_adapters(model: nn.Module, settings: PeftConfig, base: str, revision: str | None = None) -> None:
    """Freeze a model and add adapters that change nothing yet (their second factor is 0).

    Args:
        base: folder or hub id of the model's weights as they are now; written beside the adapters when they are saved.

    Raises:
        ConfigError: there are no layers of the names that the settings give.
    """
    config = _lora_config(model, settings, revision)
    training = model.training
    with _explained(settings):
        model.add_adapter(config)  # which freezes all else
    config.base_model_name_or_path = base
    model.train(training)


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


def backbone_with_adapters(policy: nn.Module) -> nn.Module:
    """A policy's backbone; where there are adapters inside, one that knows of them and saves them by itself."""
    backbone = backbone_of(policy)
    if getattr(policy, "peft_config", None):
        backbone.peft_config = copy.deepcopy(policy.peft_config)
        for config in backbone.peft_config.values():
            config.task_type = BACKBONE
            if not isinstance(config.target_modules, str):  # 'all-linear' has become whole paths
                prefix = f"{policy.base_model_prefix}."
                config.target_modules = {name.removeprefix(prefix) for name in config.target_modules}
        mark_adapters(backbone)
    return backbone


def has_adapters(model: nn.Module) -> bool:
    """Whether a model has adapters inside."""
    return bool(adapted_weights(model))


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name is an adapter's."""
    return ".lora_" in name


def save_model(model: nn.Module, folder: Path) -> None:
    """Save a model whole, or its adapters in peft's format, with the configurations that their base is to have."""
    model.save_pretrained(folder)
    if has_adapters(model):
        if model.can_generate():  # peft leaves it out
            model.generation_config.save_pretrained(folder)
        settings = copy.deepcopy(model.config)
        if hasattr(settings, "quantization_config"):  # how it was held in memory, not what it is
            del settings.quantization_config
        settings.to_json_file(folder / BASE_CONFIG)
        (folder / MODEL_CARD).unlink(missing_ok=True)  # an empty form


def merged_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's parameters by the names they have without adapters, with what its adapters add; one at a time.

    Raises:
        ConfigError: adapters add to embeddings or a head that are one tensor by the configuration.
    """
    adapted = set(map(id, adapted_weights(model).values()))
    if adapted and model.config.get_text_config().tie_word_embeddings:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if any(id(layer) in adapted for layer in ends):
            raise ConfigError(
                f"{KEY}: target_modules reach embeddings or head, which are tied in this {model.config.model_type}: "
                "vLLM cannot be given such weights; take that layer out, or set rollout_backend to chatrlhf"
            )
    return _merged(model, model.named_parameters())


def base_of(name: str) -> str | None:
    """Where the weights are that the adapters in a folder belong to; None where the folder holds no adapters.

    A run's folder may have been moved: what they belong to is then looked for beside them, under the name it had.

    Raises:
        WeightsError: their configuration cannot be read, or names no base.
    """
    settings = adapter_settings(name)
    if settings is None:
        return None
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise WeightsError(
            f"{Path(name) / ADAPTER_CONFIG}: base_model_name_or_path is {json.dumps(base)}, so nothing says which "
            "model these adapters belong to; write its folder or hub id there"
        )
    if Path(base).exists() and Path(base).resolve() == Path(name).resolve():
        raise WeightsError(
            f"{Path(name) / ADAPTER_CONFIG}: base_model_name_or_path is the folder of the adapters itself; write the "
            "folder or hub id of the model there that they were trained on"
        )
    beside = Path(name).resolve().parent / Path(base).name
    was_here = Path(base).is_absolute() and not Path(base).exists()  # the hub's names are not absolute
    is_whole = beside.exists() and not (beside / ADAPTER_CONFIG).exists()
    return str(beside) if was_here and is_whole else base


def revision_of_base(name: str) -> dict[str, str]:
    """How the base of the adapters in a folder is to be fetched: in the revision that they name, if they name one."""
    revision = (adapter_settings(name) or {}).get("revision")
    return {"revision": revision} if revision else {}


def adapter_settings(name: str) -> dict[str, Any] | None:
    """What a folder says of the adapters in it; None where it holds none."""
    path = Path(name) / ADAPTER_CONFIG
    if not path.exists():
        return None
    settings = load_settings(path)
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} holds a {type(settings).__name__}, not the settings of adapters; copy it again")
    return settings


def where(model: str) -> str:
    """Where a model's weights are, wherever this is read from."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def config_of(name: str) -> str:
    """Where the configuration is that a model, or the base of a folder's adapters, is made by."""
    base = base_of(name)
    beside = Path(name) / BASE_CONFIG
    return name if base is None else str(beside) if beside.exists() else base


@torch.no_grad()
def _merged(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    adapted = adapted_weights(model)
    for name, value in weights:
        bare = bare_name(name)
        if bare in adapted:
            yield bare, value + adapted[bare].get_delta_weight(TRAINED)
        elif not is_adapter(name):
            yield bare, value


def _lora_config(model: nn.Module, settings: PeftConfig, revision: str | None) -> Any:
    from peft import LoraConfig
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL
    from transformers.pytorch_utils import Conv1D

    return LoraConfig(
        task_type=BACKBONE if model.get_output_embeddings() is None else task_type(model.config, settings),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=settings.target_modules or USUAL.get(model.config.model_type, "all-linear"),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2's weights are transposed
        revision=revision,
    )


def task_type(config: Any, settings: PeftConfig) -> str:
    """What peft calls a language model of this configuration.

    Raises:
        ConfigError: the settings call it something else.
    """
    kind = "SEQ_2_SEQ_LM" if is_encoder_decoder(config) else "CAUSAL_LM"
    if settings.task_type not in (None, kind):
        raise ConfigError(
            f"{KEY}: task_type {settings.task_type} is not that of a {config.model_type}, which is {kind}; correct it, "
            "or leave it out"
        )
    return kind


@contextmanager
def _explained(settings: PeftConfig) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"{KEY}: no adapters for target_modules {settings.target_modules!r} ({reason})") from None


def adapted_weights(model: nn.Module) -> dict[str, Any]:
    """peft's layers, by the names that what they add to has without them.

    A layer adds to a module's ``weight``, or to one parameter of a module that has several, as experts have: then there
    is a layer for each, one around the other.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        f"{bare_name(name)}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def bare_name(name: str) -> str:
    """The name that a module or a weight has without adapters around it."""
    return name.replace(".base_layer", "")
