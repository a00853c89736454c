"""What an encoder–decoder actor cannot do, said before anything starts."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_MAPPING

from chatrlhf.config.schema import Config
from chatrlhf.data.inputs import Rows
from chatrlhf.data.pairs import refuse_row
from chatrlhf.errors import ConfigError
from chatrlhf.models.backbone import decoder_start


def check_keys_of_pairs(config: Config, stages: list[str], settings: Any) -> None:
    """Keys that an encoder–decoder actor has no use for.

    Args:
        settings: the configuration of the actor's model.

    Raises:
        ConfigError: the first of them.
    """
    actor, trainer = config.actor_config, config.trainer_config
    decoder_start(settings)
    if "PRETRAIN" in stages:
        raise ConfigError(
            f"pretrain_config: a {settings.model_type} predicts replies to what its encoder reads, and plain text has "
            "none; leave the section out, or take a causal model"
        )
    if "RL" in stages and type(settings) not in MODEL_MAPPING:
        raise ConfigError(
            f"actor_config.model: transformers' AutoModel knows no {settings.model_type}, so there is none without its "
            "head for a critic to be; take T5, BART or another encoder-decoder"
        )
    if "ACTOR" in stages and actor.loss_on != "completion":
        raise ConfigError(
            f"actor_config.loss_on: {actor.loss_on!r} asks for a loss on prompts, which the encoder of a "
            f"{settings.model_type} reads and nothing predicts; set it to completion"
        )
    if "RL" in stages and trainer.num_layers_unfrozen != -1:
        raise ConfigError(
            f"trainer_config.num_layers_unfrozen: {trainer.num_layers_unfrozen} parts the one stack of blocks that a "
            f"causal model is; a {settings.model_type} has two, and this version trains both; set it to -1, or train "
            "adapters (actor_config.peft_enable)"
        )
    if "RL" in stages and trainer.rollout_backend == "vllm":
        raise ConfigError(
            f"trainer_config.rollout_backend: vLLM samples from causal models, and the actor is a "
            f"{settings.model_type}; set it to chatrlhf"
        )


def check_rows_of_pairs(rows: Rows) -> None:
    """Rows of the ACTOR stage that an encoder–decoder cannot be trained on. Raises DataError at the first."""
    for row in (*rows.train, *rows.held_out):
        refuse_row(row)
