"""Rotary positions stretched over a longer context (`rope_scaling`).

They are part of a model's configuration and are changed there before it is made; so they are saved with it, and
whatever loads it computes the same.
"""

from __future__ import annotations

from typing import Any

from chatrlhf.config.model import OF_YARN, RopeScaling
from chatrlhf.errors import ConfigError

STRETCHING = ("linear", "dynamic", "yarn")


def stretch_positions(config: Any, scaling: RopeScaling, key: str) -> None:
    """Write a scaling into a model's configuration, instead of any that is there.

    Args:
        config: a transformers configuration.
        key: of `rope_scaling` in the YAML file, for messages.

    Raises:
        ConfigError: the model has no rotary positions that transformers can scale.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None)
    if not parameters:
        raise ConfigError(
            f"{key}: {text.model_type} has no rotary positions that can be scaled; set it to null, or take another"
        )
    # Where layers differ, those with a sliding window never look further than it reaches.
    nested = parameters.get("full_attention")
    own = nested if isinstance(nested, dict) else parameters
    original = scaling.original_max_position_embeddings
    original = original or own.get("original_max_position_embeddings") or text.max_position_embeddings
    kept = {name: own[name] for name in ("rope_theta", "partial_rotary_factor") if name in own}
    if scaling.rope_theta is not None:
        kept["rope_theta"] = scaling.rope_theta
    made = {**kept, "rope_type": scaling.type}
    if scaling.factor is not None:
        made["factor"] = scaling.factor
    if scaling.type == "yarn":
        made["original_max_position_embeddings"] = original
        made |= {name: value for name in OF_YARN if (value := getattr(scaling, name)) is not None}
    if scaling.type in ("linear", "dynamic"):
        text.max_position_embeddings = original  # what transformers' dynamic scaling starts from
    text.rope_parameters = {**parameters, "full_attention": made} if own is nested else made


def positions(config: Any) -> int:
    """Positions a model can take, scaling included; a large number for models without a bound (ALiBi)."""
    text = config.get_text_config()
    # T5's configurations name the length that it was trained at; its positions are relative.
    absolute = None if hasattr(text, "relative_attention_num_buckets") else getattr(text, "n_positions", None)
    bound = int(getattr(text, "max_position_embeddings", None) or absolute or 1 << 30)
    bound = bound if bound > 0 else 1 << 30  # XLNet's is -1
    parameters = _parameters(text)
    if parameters.get("rope_type") not in STRETCHING:
        return bound
    original = parameters.get("original_max_position_embeddings", bound)
    # Some published models count what they were stretched to as their own already.
    return max(bound, int(original * parameters["factor"]))


def same_positions(first: Any, second: Any) -> bool:
    """Whether two configurations turn positions alike."""
    return rotation(first) == rotation(second)


def rotation(config: Any) -> dict[str, Any]:
    """How a model's positions turn, numbers as floats; empty without any."""
    given = {name: value for name, value in _parameters(config.get_text_config()).items() if value is not None}
    return {name: float(value) if isinstance(value, (int, float)) else value for name, value in given.items()}


def turns_by_length(config: Any) -> bool:
    """Whether a token's rotation depends on the longest row in its batch."""
    return _parameters(config.get_text_config()).get("rope_type") in ("dynamic", "longrope")


def refuse_rotations_by_length(config: Any, longest: int) -> None:
    """RL scores a token again among other rows than those it was sampled with, and has to find what it was then.

    Args:
        longest: tokens of prompt and response together.

    Raises:
        ConfigError: a token's rotation depends on the longest row in its batch.
    """
    text = config.get_text_config()
    if _parameters(text).get("rope_type") != "dynamic" or longest <= text.max_position_embeddings:
        return
    raise ConfigError(
        "actor_config.rope_scaling: with type 'dynamic' a token's log-probability depends on the longest row in its "
        f"batch, which PPO cannot use; take linear or yarn, or keep actor_config.max_sequence_length within "
        f"{text.max_position_embeddings}"
    )


def _parameters(text: Any) -> dict[str, Any]:
    """Those of the layers that see everything, where layers differ."""
    parameters = getattr(text, "rope_parameters", None) or {}
    return parameters.get("full_attention") or parameters
