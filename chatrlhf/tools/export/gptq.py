"""GPTQ (Frantar et al. 2023, "GPTQ: Accurate Post-Training Quantization"), through llmcompressor.

Each linear layer's weights become 4-bit integers with one scale for every group of inputs. Column after column is
rounded, those with the largest activations first, and what a column loses the later ones make good, as far as the
calibration rows show them.

That order is what AutoGPTQ calls ``desc_act``. The groups stay as the columns lie: llmcompressor has taken out the
variant that regroups the columns, which needs an index beside the weights and is slower to run.
"""

from __future__ import annotations

import io
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from torch import nn

from chatrlhf.errors import ConfigError

BITS = 4


def refuse_groups(model: nn.Module, group_size: int) -> None:
    """A group is whole in every layer.

    Args:
        model: its modules will do; they may be without weights.

    Raises:
        ConfigError: there are no linear layers, or the inputs of one cannot be parted; it names a size that will do.
    """
    inputs = {name: layer.in_features for name, layer in linear_layers(model).items()}
    if not inputs:
        raise ConfigError(
            f"--method gptq: {model.config.model_type} has no linear layers (nn.Linear) that llmcompressor could "
            "quantize; take nf4 or int8"
        )
    wrong = {name: width for name, width in inputs.items() if width % group_size}
    if not wrong:
        return
    name, width = next(iter(wrong.items()))
    common = math.gcd(*inputs.values())
    fits = max(size for size in (1 << i for i in range(11)) if common % size == 0)
    raise ConfigError(
        f"--group-size: {group_size} does not divide the inputs of {len(wrong)} of {len(inputs)} layers ({name} has "
        f"{width:,}); {fits} divides all of them"
    )


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """Those that are quantized: all but the one that gives the logits."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def quantize_gptq(model: nn.Module, tokenizer: Any, rows: list[list[int]], group_size: int) -> None:
    """Round a model's weights in place; its `save_pretrained` then writes the integers.

    Args:
        model: on the CPU; a GPU is used a layer at a time where there is one.
        rows: token ids to calibrate on, all of one length.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import LoggerConfig, configure_logger, oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    configure_logger(LoggerConfig(console_log_level="ERROR"))
    layers = list(linear_layers(model))
    weights = QuantizationArgs(
        num_bits=BITS, symmetric=True, strategy="group", group_size=group_size, actorder="weight"
    )
    modifier = GPTQModifier(config_groups={"all": QuantizationScheme(targets=layers, weights=weights)}, ignore=[])
    with bars_on_a_terminal_only():
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=Dataset.from_dict({"input_ids": rows}),
            recipe=modifier,
            num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]),
            shuffle_calibration_samples=False,
        )


def save_gptq(model: nn.Module, folder: Path) -> None:
    """Write the integers, their scales and a configuration that says how to read them."""
    with bars_on_a_terminal_only(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder)


@contextmanager
def bars_on_a_terminal_only() -> Iterator[None]:
    """The progress bars of llmcompressor and of what reads its files, or none where no one watches."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
