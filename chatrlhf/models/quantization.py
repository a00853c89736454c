"""Models whose weights lie in 4 or 8 bits, through bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from chatrlhf.config.quantization import QuantizationKeys
from chatrlhf.device import pick_device, resolve_precision
from chatrlhf.errors import ConfigError

# Of bitsandbytes' layer: on a CPU with AVX-512 BF16 its first forward without gradients repacks the weights, for a
# product that has no backward. From then on no gradient would come through the layer, and nothing would say so.
REPACKS = "support_avx512bf16_for_cpu"


def quantization_of(keys: QuantizationKeys, precision: str) -> dict[str, Any]:
    """What `from_pretrained` is told; nothing where weights are to be whole.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if not keys.is_quantized:
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            'actor_config: load_in_4bit and load_in_8bit need bitsandbytes; pip install "chatrlhf[quantize]"'
        )
    from transformers import BitsAndBytesConfig

    computes = keys.bnb_4bit_compute_dtype
    if computes is None:
        computes = "bfloat16" if resolve_precision(precision, pick_device()) == "bf16" else "float32"
    config = BitsAndBytesConfig(
        load_in_4bit=keys.load_in_4bit,
        load_in_8bit=keys.load_in_8bit,
        bnb_4bit_quant_type=keys.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=keys.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=getattr(torch, computes),
    )
    return {"quantization_config": config}


def ready_for_adapters(model: nn.Module, gradient_checkpointing: bool) -> nn.Module:
    """A model with weights in few bits, frozen, through which gradients flow; any other as it is."""
    if not getattr(model, "is_quantized", False):
        return model
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        if hasattr(module, REPACKS):
            setattr(module, REPACKS, False)
    return prepare_model_for_kbit_training(
        model, gradient_checkpointing, {"use_reentrant": False} if gradient_checkpointing else None
    )
