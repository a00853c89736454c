"""How many weights each stage trains at the least, known from files' headers before a model is read."""

from __future__ import annotations

from math import prod

from chatrlhf.config.schema import ActorConfig, Config
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.loading.weight_files import damage, headers, local_folder, weight_files


def trained_weights(config: Config, stages: list[str], has_reward_fn: bool) -> dict[str, int]:
    """By stage. 0 where it is not known: adapters, models that are not on this machine, files that are damaged."""
    actor, reward = config.actor_config, config.reward_config
    of_actor = 0 if actor.peft_enable else _weights(actor.model, actor)
    found = {}
    for stage in stages:
        if stage in ("PRETRAIN", "ACTOR"):
            found[stage] = of_actor
        elif stage == "REWARD" and not has_reward_fn:
            is_start = reward.model in ("actor", TINY, None)
            name = actor.model if is_start else str(reward.model)
            found[stage] = 0 if reward.peft_enable else _weights(name, actor)
        elif stage == "RL":
            found[stage] = of_actor if config.trainer_config.num_layers_unfrozen == -1 else 0
    return found


def _weights(name: str, actor: ActorConfig) -> int:
    if name == TINY:
        tiny = actor.tiny
        width = tiny.intermediate_size or 8 * tiny.hidden_size // 3
        # Key and value heads may be fewer, and the vocabulary is as large as the data make it.
        return tiny.num_hidden_layers * (2 * tiny.hidden_size**2 + 3 * tiny.hidden_size * width)
    folder = local_folder(name) if base_of(name) is None else None
    files = [] if folder is None else weight_files(folder)
    if any(damage(path) is not None for path in files):  # whoever reads it says so
        return 0
    return sum(prod(each.shape) for path in files for each in headers(path).values() if each.is_floating)
