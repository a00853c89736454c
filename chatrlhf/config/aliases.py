"""ChatLLaMA's, trlX's and Hugging Face's names, translated into this project's.

Facts from ChatLLaMA's published config.yaml and trlX's PPO method config. What a key meant is kept.
"""

from __future__ import annotations

import math
from typing import Any

from chatrlhf.errors import ConfigError

# their key -> our key, a section at a time
RENAMED: dict[str, dict[str, str]] = {
    "trainer_config": {
        "actor_eps_clip": "cliprange",
        "critic_eps_clip": "cliprange_value",
        "beta_s": "entropy_coef",
        "ent_coef": "entropy_coef",
        "gamma_discounted": "gamma",
        "epochs": "ppo_epochs",
        "generation_kwargs": "gen_kwargs",
        "minibatch_size": "micro_batch_size",
        "save_total_limit": "n_checkpoints_to_keep",
    },
    "pretrain_config": {"use_gradient_checkpointing": "gradient_checkpointing"},
    "actor_config": {
        "additional_prompt_tokens": "additonal_prompt_tokens",
        "freeze_embeddings": "froze_embeddings",
        "label_smoothing": "label_smoothing_factor",
        "noisy_embedding_alpha": "neftune_noise_alpha",
        "save_total_limit": "n_checkpoints_to_keep",
        "use_gradient_checkpointing": "gradient_checkpointing",
    },
    "reward_config": {"save_total_limit": "n_checkpoints_to_keep"},
}

# StableVicuna's table lists these below "generation_kwargs" without indenting them.
FLAT_GENERATION_KEYS = (
    "max_length",
    "min_length",
    "max_new_tokens",
    "min_new_tokens",
    "top_k",
    "top_p",
    "do_sample",
    "temperature",
    "repetition_penalty",
)


def translate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Give every key this project's name.

    Args:
        raw: the parsed YAML, sections as dictionaries.

    Returns:
        A new dictionary with this project's names, and notes for the reader.

    Raises:
        ConfigError: a key and its alias are both given.
    """
    config = {name: dict(value) if isinstance(value, dict) else value for name, value in raw.items()}
    notes: list[str] = []
    for section, renamed in RENAMED.items():
        values = config.get(section)
        if not isinstance(values, dict):
            continue
        for theirs, ours in renamed.items():
            if theirs not in values:
                continue
            if ours in values:
                raise ConfigError(f"{section}: {theirs!r} and {ours!r} are one setting; keep one of them")
            values[ours] = values.pop(theirs)
    if isinstance(config.get("actor_config"), dict):
        _fold_superhot(config["actor_config"])
    trainer = config.get("trainer_config")
    if isinstance(trainer, dict):
        _fold_generation_keys(trainer)
        if trainer.get("target") is not None:
            notes.append(
                "trainer_config.target is compared with the k1 estimate of the KL over the response (nats per "
                "sequence); trlX compares exp(d) - 1 - d summed over prompt and response"
            )
    return config, notes


def _fold_superhot(actor: dict[str, Any]) -> None:
    """OpenAssistant's switch with its settings in a key of their own, or in its place, as `rope_scaling`."""
    switch, settings = actor.pop("superhot", None), actor.pop("superhot_config", None)
    if isinstance(switch, dict):
        switch, settings = True, switch
    if not switch:
        return
    if settings is None or "rope_scaling" in actor:
        raise ConfigError(
            "actor_config.superhot: it goes with superhot_config ({type: linear, scale: 2}), and is the same as "
            "rope_scaling; give one of them"
        )
    actor["rope_scaling"] = settings


def _fold_generation_keys(trainer: dict[str, Any]) -> None:
    flat = {key: trainer.pop(key) for key in FLAT_GENERATION_KEYS if key in trainer}
    nested = trainer.get("gen_kwargs")
    if nested is None:
        nested = {}
    if isinstance(nested, dict):
        for key in flat:
            if key in nested:
                raise ConfigError(f"trainer_config: {key!r} stands in gen_kwargs and beside it; keep one of them")
        if "gen_kwargs" in trainer or flat:
            trainer["gen_kwargs"] = {**nested, **flat}


def count_episodes(config: dict[str, Any]) -> dict[str, Any]:
    """Add rollouts in all and between two updates, from ChatLLaMA's episodes, timesteps and examples.

    Raises:
        ConfigError: one factor of a product stands alone.
    """
    trainer = config.get("trainer_config")
    if not isinstance(trainer, dict):
        return config

    def product(*keys: str, trainer: dict[str, Any] = trainer) -> int | None:
        values: list[Any] = [trainer.get(key, 1 if key == "num_examples" else None) for key in keys]
        if any(not isinstance(value, int) or isinstance(value, bool) for value in values):
            return None  # absent or malformed: the schema says which
        return math.prod(values)

    derived = {
        "total_episodes": product("num_episodes", "max_timesteps", "num_examples"),
        "num_rollouts": product("update_timesteps", "num_examples"),
    }
    counted = {key: value for key, value in derived.items() if value is not None and trainer.get(key) is None}
    trainer = {**trainer, **counted}
    for key, other in (("num_episodes", "max_timesteps"), ("max_timesteps", "num_episodes")):
        alone = trainer.get(key) is not None and trainer.get(other) is None
        if alone and trainer.get("total_episodes") is None:
            raise ConfigError(f"trainer_config.{key}: {key!r} counts only with {other!r}; give both, or total_episodes")
    return {**config, "trainer_config": trainer}
