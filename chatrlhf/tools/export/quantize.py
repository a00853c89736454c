"""A quantized model: by GPTQ, which looks at data, or by bitsandbytes' types, which do not.

What is written loads by `AutoModelForCausalLM.from_pretrained`, and has been loaded like that, and its perplexity
measured, before it is put in its place.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.generation_config import check_generation_config, make_savable
from chatrlhf.models.loading.loading_report import explained, load_pretrained
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.quantization import quantization_from
from chatrlhf.models.loading.rope import positions
from chatrlhf.models.loading.safe_config import auto_config
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.runtime.device import pick_device
from chatrlhf.tools.evaluate.perplexity import PerplexityCurve, perplexity_curve, window_ends
from chatrlhf.tools.export.calibration import pieces, tokens_of
from chatrlhf.tools.export.delta import refuse_existing
from chatrlhf.tools.export.gptq import bars_on_a_terminal_only, quantize_gptq, refuse_groups, save_gptq
from chatrlhf.tools.export.provenance import write_origin
from chatrlhf.tools.export.weights import copy_other_files

GPTQ, NF4, INT8 = "gptq", "nf4", "int8"
PACKAGES = {GPTQ: "llmcompressor", NF4: "bitsandbytes", INT8: "bitsandbytes"}
HELD_OUT = 10  # one token in so many, of the calibration's where no text of its own is named
STRIDE = 32  # tokens that are predicted in a window


@dataclass(frozen=True)
class Asked:
    """What `chatrlhf export quantize` was told."""

    model: Path
    output: Path
    method: str
    calibration: Path | None  # rows or a text that GPTQ looks at
    text: Path | None  # what perplexity is measured on; None: the last tenth of the calibration's tokens
    group_size: int = 128
    samples: int = 128  # pieces of the calibration's tokens
    length: int = 2048  # tokens of a piece, as far as the model has positions
    context: int = 512  # tokens of a window of the perplexity
    windows: int = 64
    dtype: torch.dtype = torch.bfloat16  # of what is not quantized


@dataclass(frozen=True)
class Compared:
    """The model before and after."""

    before: PerplexityCurve
    after: PerplexityCurve
    targets: int  # tokens that both predicted
    bytes_before: int  # of weights, in the type that is asked for
    bytes_after: int


def quantize(asked: Asked, warn: Callable[[str], None] = print) -> Compared:
    """Write a quantized model, with tokenizer and template.

    Args:
        warn: is told what was changed in its generation_config.json.

    Raises:
        ConfigError: the options do not go together, the model cannot be quantized, or the output is there already.
        DataError: a file cannot be read or is too short.
    """
    _check(asked)
    config = _config(asked)
    if asked.method == GPTQ:
        with torch.device("meta"):
            refuse_groups(AutoModelForCausalLM.from_config(config), asked.group_size)
    tokenizer = load_tokenizer(str(asked.model), "--model")
    rows, targets = _tokens(asked, tokenizer, min(asked.length, positions(config)))
    context = min(asked.context, positions(config))
    stride = min(STRIDE, context - 1)
    ends = window_ends(len(targets), context, stride, asked.windows)

    def measure(model: nn.Module, name: str) -> PerplexityCurve:
        return perplexity_curve(model, targets, [context], stride, ends, name)

    model = load_pretrained(AutoModelForCausalLM, str(asked.model), "--model", config=config, dtype=asked.dtype)
    for change in make_savable(model):
        warn(change)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    before = measure(model.to(pick_device()), f"before ({str(asked.dtype).removeprefix('torch.')})")
    if asked.method == GPTQ:
        quantize_gptq(model.to("cpu"), tokenizer, rows, asked.group_size)
        save: Callable[[Path], None] = partial(save_gptq, model)
    else:
        del model
        # Written before its first forward, in which bitsandbytes may lay the weights out anew.
        model = _in_few_bits(asked, config)
        make_savable(model)
        save = model.save_pretrained
    found: dict[str, Any] = {}

    def write(folder: Path) -> None:
        copy_other_files(asked.model, folder)
        save(folder)
        with bars_on_a_terminal_only():
            found["after"] = measure(_loaded(folder), f"after ({asked.method})")
        found["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        figures = {each.name: each.perplexity[context] for each in (before, found["after"])}
        write_origin(folder, asked.model, f"quantized by {PACKAGES[asked.method]}: {_words(asked)}", perplexity=figures)

    publish_folder(asked.output, write)
    return Compared(before, found["after"], len(ends) * stride, size, found["bytes"])


def _check(asked: Asked) -> None:
    """What can be known before anything is read."""
    refuse_existing(asked.output)
    package = PACKAGES[asked.method]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f'--method {asked.method} needs {package}; pip install "chatrlhf[quantize]"')
    if asked.method == GPTQ and asked.calibration is None:
        raise ConfigError("--calibration: gptq looks at data; name a file of rows, or a text, like what will be read")
    if asked.method != GPTQ and asked.calibration is not None:
        raise ConfigError(f"--calibration: {asked.method} looks at no data; leave it out, and name a --text")
    if asked.text is None and asked.calibration is None:
        raise ConfigError("--text: name a text, on which perplexity is measured before and after")
    if base_of(str(asked.model)) is not None:
        raise ConfigError(f"--model: {asked.model} holds adapters; make it whole first: chatrlhf export merge")


def _config(asked: Asked) -> Any:
    check_generation_config(str(asked.model), "--model")
    with explained("--model", str(asked.model)):
        config = auto_config(asked.model)
    if hasattr(config, "quantization_config"):
        raise ConfigError(f"--model: the weights of {asked.model} are quantized already; name the whole model")
    return config


def _tokens(asked: Asked, tokenizer: Any, length: int) -> tuple[list[list[int]], torch.Tensor]:
    """Rows to calibrate on, and tokens to predict, which are none of these."""
    most, rows = asked.samples * length, []
    measured = asked.windows * max(STRIDE, asked.context)
    if asked.calibration is not None:
        ids = tokens_of(asked.calibration, "--calibration", asked.model, tokenizer, most + measured)
        if asked.text is None:
            end = max(len(ids) - max(len(ids) // HELD_OUT, min(asked.context, length)), 0)
            ids, rest = ids[:end], ids[end:]
        rows = pieces(ids, length, asked.samples, "--calibration")
    if asked.text is not None:
        rest = tokens_of(asked.text, "--text", asked.model, tokenizer, measured)
    return rows, torch.tensor(rest)


def _in_few_bits(asked: Asked, config: Any) -> nn.Module:
    how: dict[str, Any] = {"load_in_8bit": True}
    if asked.method == NF4:
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": NF4, "bnb_4bit_use_double_quant": True}
        how["bnb_4bit_compute_dtype"] = asked.dtype
    kwargs = quantization_from(how, "--method")
    arguments = {"config": config, "dtype": asked.dtype, **kwargs}
    return load_pretrained(AutoModelForCausalLM, str(asked.model), "--model", **arguments)


def _loaded(folder: Path) -> nn.Module:
    """As anybody will load it."""
    model = load_pretrained(AutoModelForCausalLM, str(folder), "--output")
    return model if hasattr(model, "hf_device_map") else model.to(pick_device())


def _words(asked: Asked) -> str:
    if asked.method == GPTQ:
        return f"GPTQ, 4 bits, groups of {asked.group_size}, in the order of activations"
    return "4 bits, NF4, double quantization" if asked.method == NF4 else "8 bits (LLM.int8())"
