"""Sizes in a model's config.json: whole numbers within what any model has, checked before a model is built by them."""

from __future__ import annotations

from typing import Any

from chatrlhf.errors import ConfigError

# The most of each that is believed: ten times and more of what was ever published.
MOST = {
    "hidden_size": 10**6,
    "intermediate_size": 10**7,
    "num_hidden_layers": 10**4,
    "num_attention_heads": 10**5,
    "num_key_value_heads": 10**5,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
}


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
