"""Whether adapters meet the rotary positions that they were trained with.

On positions that are stretched otherwise they are worse at every length, and nothing else would say so.
"""

from __future__ import annotations

from pathlib import Path

from chatrlhf.config.model import RopeScaling
from chatrlhf.models.loading.lora import BASE_CONFIG, base_of
from chatrlhf.models.loading.pretrained import read_model_config
from chatrlhf.models.loading.rope import rotation, stretch_positions

KEY = "actor_config.rope_scaling"


def scaling_warning(model: str, asked: RopeScaling | None, heeded: bool = True) -> str | None:
    """What is to be said before the adapters in a folder are loaded; None where they meet what they were trained with.

    Of adapters without the configuration that this package writes beside them nothing is known, and nothing said.

    Args:
        model: a folder of adapters, or any other model.
        asked: `rope_scaling` of the configuration.
        heeded: whether it is computed with that; otherwise with what the adapters were trained with.
    """
    base = base_of(model)
    if base is None or not (Path(model) / BASE_CONFIG).exists():
        return None
    settings = read_model_config(model, KEY)
    trained = rotation(settings)
    if asked is None:
        own = rotation(read_model_config(base, KEY))
        # A base that is not stretched itself is as adapters find it that were trained with `rope_scaling`.
        if own == trained or (own["rope_type"] == "default" and own["rope_theta"] == trained["rope_theta"]):
            return None
        return (
            f"{model}: its adapters were trained on rotary positions {_said(trained)}, and {base} has {_said(own)}; "
            "it is computed as they were trained, but check that this is the base they belong to"
        )
    stretch_positions(settings, asked, KEY)
    wanted = rotation(settings)
    if wanted == trained:
        return None
    came = "with which they are worse at every length" if heeded else "which is not heeded: they stay as they were"
    return (
        f"{model}: its adapters were trained on rotary positions {_said(trained)}, and {KEY} asks for "
        f"{_said(wanted)}, {came}; set it to what they were trained with, or train them anew"
    )


def _said(parameters: dict[str, object]) -> str:
    rest = ", ".join(f"{name} {value:g}" for name, value in sorted(parameters.items()) if isinstance(value, float))
    return f"'{parameters['rope_type']}' ({rest})"
