"""Adapters added to the weights they belong to: a model that any tool loads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.export.delta import refuse_existing
from chatrlhf.export.origin import public_name, write_origin
from chatrlhf.models.adapter_scaling import scaling_warning
from chatrlhf.models.adapters import base_of, config_of, revision_of_base
from chatrlhf.models.backbone import language_model_class, read_by
from chatrlhf.models.generation_config import (
    adopt_generation_config,
    check_generation_config,
    make_savable,
    notes_of,
)
from chatrlhf.models.stop_tokens import stop_tokens, write_stop_tokens
from chatrlhf.trainers.checkpoint import publish_folder

ROWS, LENGTH = 4, 32  # of random tokens, on which the logits of both are compared
MOST_OF_SPREAD = 0.05  # difference of logits, in deviations of the logits: what rounding to 16 bits may do


@dataclass(frozen=True)
class Comparison:
    """Logits of the merged model and of base and adapters, both in the type they are saved in."""

    difference: float  # root of the mean square
    spread: float  # standard deviation of the logits


def merge(adapters: Path, output: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> Comparison:
    """Write base + adapters as one model, with tokenizer and template.

    Args:
        warn: is told where the base is stretched otherwise than the one that the adapters were trained upon, and what
            was changed in its generation_config.json.

    Raises:
        ConfigError: the folder holds no adapters, their base is not to be found, or the output is there already.
        CheckpointError: the merged model computes something else.
    """
    from peft import PeftModel

    refuse_existing(output)
    base = base_of(str(adapters))
    if base is None:
        raise ConfigError(f"--model: {adapters} holds no adapters (adapter_config.json); it is whole already")
    fetched = revision_of_base(str(adapters))
    check_generation_config(base, "--model", fetched.get("revision"))
    try:
        config = AutoConfig.from_pretrained(config_of(str(adapters)), **fetched)
        model = language_model_class(config).from_pretrained(base, config=config, dtype=dtype, **fetched)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"--model: the base of these adapters, {base!r}, cannot be loaded ({reason})") from None
    if (warning := scaling_warning(str(adapters), None)) is not None:
        warn(warning)
    tokenizer = AutoTokenizer.from_pretrained(adapters)
    adopt_generation_config(model, adapters)
    ends = stop_tokens(model, tokenizer)
    write_stop_tokens(model, ends.ids)
    for change in (*make_savable(model), *notes_of(ends)):
        warn(change)
    ids = torch.randint(
        0, model.config.get_text_config().vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    wrapped = PeftModel.from_pretrained(model, adapters).eval()
    apart = _logits(wrapped, ids)
    # Summed in float32: in 16 bits the small product of the adapters would be rounded before it is added.
    merged = wrapped.float().merge_and_unload().to(dtype)
    compared = Comparison(float((_logits(merged, ids) - apart).square().mean().sqrt()), float(apart.std()))
    if not compared.difference <= MOST_OF_SPREAD * compared.spread:
        raise CheckpointError(
            f"the merged model's logits differ by {compared.difference:.3g} from those of base and adapters, whose "
            f"deviation is {compared.spread:.3g}: too much for rounding; nothing was written"
        )

    def write(folder: Path) -> None:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_origin(folder, adapters, f"adapters merged into {public_name(base)}, {str(dtype).removeprefix('torch.')}")

    publish_folder(output, write)
    return compared


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(**read_by(model.config, ids)).logits.float()
