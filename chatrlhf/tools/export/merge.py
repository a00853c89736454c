"""Adapters added to the weights they belong to: a model that any tool loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoTokenizer

from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.models.loading.adapter_loading import wrapped
from chatrlhf.models.loading.adapter_merging import Comparison
from chatrlhf.models.loading.adapter_merging import merge as merge_adapters
from chatrlhf.models.loading.backbone import language_model_class
from chatrlhf.models.loading.generation_config import (
    adopt_generation_config,
    check_generation_config,
    make_savable,
    notes_of,
)
from chatrlhf.models.loading.loading_report import explained, load_pretrained
from chatrlhf.models.loading.lora import base_of, config_of, revision_of_base
from chatrlhf.models.loading.rope_mismatch import scaling_warning
from chatrlhf.models.loading.safe_config import auto_config
from chatrlhf.models.stop_tokens import stop_tokens, write_stop_tokens
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.tools.export.delta import refuse_existing
from chatrlhf.tools.export.provenance import public_name, write_origin

TOKENS = (4, 32)  # rows and length of random ids, on which the logits of both are compared


def merge(adapters: Path, output: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> Comparison:
    """Write base + adapters as one model, with tokenizer and template.

    Args:
        warn: is told where the base is stretched otherwise than the one that the adapters were trained on, and what
            was changed in its generation_config.json.

    Raises:
        ConfigError: the folder holds no adapters, their base is not to be found, or the output is there already.
        CheckpointError: the merged model computes something else.
    """
    refuse_existing(output)
    base = base_of(str(adapters))
    if base is None:
        raise ConfigError(f"--model: {adapters} holds no adapters (adapter_config.json); it is whole already")
    key, fetched = f"--model: the base of the adapters in {adapters}", revision_of_base(str(adapters))
    check_generation_config(base, "--model", fetched.get("revision"))
    with explained(key, config_of(str(adapters))):
        config = auto_config(config_of(str(adapters)), **fetched)
    model = load_pretrained(language_model_class(config), base, key, config=config, dtype=dtype, **fetched)
    if (warning := scaling_warning(str(adapters), None)) is not None:
        warn(warning)
    adapted = wrapped(model, adapters)
    with explained("--model", str(adapters)):
        tokenizer = AutoTokenizer.from_pretrained(adapters, trust_remote_code=False)
    adopt_generation_config(model, adapters)
    ends = stop_tokens(model, tokenizer)
    write_stop_tokens(model, ends.ids)
    for change in (*make_savable(model), *notes_of(ends)):
        warn(change)
    merged, compared = merge_adapters(adapted, adapters, TOKENS, dtype)
    if not compared.is_rounding:
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
