"""Models quantized to 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import Tensor, nn

from chatrlhf.config.model import QuantizationKeys
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.device import DTYPES, pick_device, resolve_precision

# Of bitsandbytes' layer: on a CPU with AVX-512 BF16 its first forward without gradients repacks the weights, for a
# product that has no backward. From then on no gradient would come through the layer, and nothing would say so.
REPACKS = "support_avx512bf16_for_cpu"

# What a run says of its weights: names of `BitsAndBytesConfig`.
WRITTEN = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
)


def quantization_of(keys: QuantizationKeys, precision: str, section: str) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing where weights are to be whole.

    Args:
        precision: of the products, where `bnb_4bit_compute_dtype` leaves it open.
        section: of the keys, for messages.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if not keys.is_quantized:
        return {}
    computes = keys.bnb_4bit_compute_dtype
    if computes is None:
        computes = str(DTYPES[resolve_precision(precision, pick_device())]).removeprefix("torch.")
    how = {
        "load_in_4bit": keys.load_in_4bit,
        "load_in_8bit": keys.load_in_8bit,
        "bnb_4bit_quant_type": keys.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": keys.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": computes,
    }
    return quantization_from(how, section)


def quantization_from(how: dict[str, Any] | None, section: str) -> dict[str, Any]:
    """What `from_pretrained` is told so that weights are as `how_quantized` said.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if how is None:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f'{section}: weights in 4 or 8 bits need bitsandbytes; pip install "chatrlhf[quantize]"')
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**how)}


def how_quantized(model: nn.Module) -> dict[str, Any] | None:
    """How a model's weights are in bitsandbytes' types, as it can be written down; None where they do not."""
    config = getattr(model.config, "quantization_config", None)
    if getattr(config, "quant_method", None) != "bitsandbytes":  # GPTQ's lie as llmcompressor wrote them
        return None
    written = config.to_dict()
    return {name: written[name] for name in WRITTEN}


def ready_for_adapters(model: nn.Module, gradient_checkpointing: bool = False) -> nn.Module:
    """A model with quantized weights, frozen, through which gradients flow; any other as it is."""
    if how_quantized(model) is None:
        return model
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(
        model, gradient_checkpointing, {"use_reentrant": False} if gradient_checkpointing else None
    )


def never_repack(model: nn.Module) -> nn.Module:
    """Keep quantized weights as they are, whatever is asked of them first; see `REPACKS`."""
    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    return model


def states_beside_weights(model: nn.Module) -> list[Any]:
    """What bitsandbytes keeps beside quantized weights in order to read them."""
    states = [getattr(module, name, None) for module in model.modules() for name in ("quant_state", "state")]
    return [each for each in states if each is not None and not callable(each)]


def in_whole_weights(model: nn.Module, added: dict[str, Tensor]) -> set[str]:
    """Read all quantized weights back into float32, in place.

    Args:
        added: what is to be added to them, by the weight's name.

    Returns:
        The names of the weights that were quantized.
    """
    read_back: set[str] = set()
    if how_quantized(model) is None:
        return read_back
    from peft.utils.integrations import dequantize_module_weight
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if not hasattr(module, "source_cls"):  # what transformers notes on bitsandbytes' layers: what they were
            continue
        weight = dequantize_module_weight(module).float()
        if f"{name}.weight" in added:
            weight = weight + added[f"{name}.weight"].float()
        if issubclass(module.source_cls, Conv1D):  # GPT-2's lie transposed
            whole, weight = Conv1D(module.out_features, module.in_features), weight.T.contiguous()
        else:
            whole = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        whole.weight = nn.Parameter(weight)
        whole.bias = module.bias
        model.set_submodule(name, whole)
        read_back.add(f"{name}.weight")
    del model.config.quantization_config
    return read_back
