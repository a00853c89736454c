"""Sizes in a model's config.json: whole numbers within what any model has, checked before a model is built by them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError

# The most of each that is believed: ten times and more of what was ever published.
MOST = {
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 2000,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}
# The same by the names of other families.
MOST_BY_OTHER_NAMES = {
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim", "dim", "word_embed_proj_dim"), MOST["hidden_size"]),
    **dict.fromkeys(("d_ff", "ffn_dim", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"), MOST["intermediate_size"]),
    **dict.fromkeys(
        ("n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"),
        MOST["num_hidden_layers"],
    ),
    **dict.fromkeys(
        ("n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"),
        MOST["num_attention_heads"],
    ),
    **dict.fromkeys(("n_positions", "max_seq_len"), MOST["max_position_embeddings"]),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 10**5),
}
MAX_FILE = 20_000_000  # bytes of a config.json; labels of a classifier may take some


def check_file(key: str, place: str) -> None:
    """Refuse the config.json of a folder by its sizes, before transformers makes lists of that many layers.

    What is no number, or cannot be read at all, is left to transformers and `check_sizes`.

    Raises:
        ConfigError: it names the size.
    """
    path = Path(place) / "config.json"
    try:
        size = path.stat().st_size if path.is_file() else 0
    except (OSError, ValueError):
        return
    if size > MAX_FILE:
        raise ConfigError(
            f"{key}: the config.json of {place!r} has {size:,} bytes, which no model's has; restore the file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if size else None
    except (OSError, ValueError, RecursionError):
        return
    for name, value, most in _sizes_in(content):
        if isinstance(value, int) and not isinstance(value, bool) and not 0 <= value <= most:
            shown = value if abs(value) < 10**18 else f"of {len(str(abs(value)))} digits"
            raise ConfigError(
                f"{key}: the config.json of {place!r} has {name} {shown}, and expected is a whole number from 1 to "
                f"{most:,}; restore the file"
            )


def _sizes_in(content: Any) -> Iterator[tuple[str, Any, int]]:
    """Each size in a configuration and in the ones inside it, such as ``text_config``, with the most it may be."""
    if not isinstance(content, dict):
        return
    for name, most in (MOST | MOST_BY_OTHER_NAMES).items():
        if name in content:
            yield name, content[name], most
    for name, inner in content.items():
        if name.endswith("_config"):
            yield from _sizes_in(inner)


def check_sizes(settings: Any, key: str, place: str) -> None:
    """Refuse a size that is no whole number from 1 on, or that is beyond belief.

    Args:
        settings: a transformers configuration; sizes that its family does not have are left out.
        key: of the configuration that names the model.
        place: where it was read.

    Raises:
        ConfigError: it names the size.
    """
    text = settings.get_text_config()
    for name, most in MOST.items():
        size = getattr(text, name, None)
        if size is None or isinstance(size, (list, tuple)):  # some families have one a layer
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise ConfigError(
                f"{key}: the config.json of {place!r} has {name} {size!r}, and expected is a whole number from 1 to "
                f"{most:,}; restore the file"
            )
