"""Language models of both builds, causal and encoder–decoder: which class loads one, and what lies under its head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from chatrlhf.errors import ConfigError

KEPT = "chatrlhf_backbone"  # attribute of the model


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model of this configuration reads a prompt by an encoder and gives the reply by a decoder."""
    return bool(getattr(config, "is_encoder_decoder", False))


def language_model_class(config: Any) -> Any:
    """The Auto class that loads a language model of this configuration."""
    return AutoModelForSeq2SeqLM if is_encoder_decoder(config) else AutoModelForCausalLM


def backbone_of(model: nn.Module) -> nn.Module:
    """A language model without its head, on the same weights; a model that has none is its own.

    T5 and its kin keep encoder and decoder beside the head, with no module around them. They get one here, of the
    class that `AutoModel` gives: it is kept on the model, outside of its children, and goes with it into copies.
    """
    base = model.base_model
    if base is not model or not is_encoder_decoder(model.config) or model.get_output_embeddings() is None:
        return base
    known = model.__dict__.get(KEPT)
    if known is None:
        with torch.device("meta"):
            known = AutoModel.from_config(model.config)
        for name, _ in known.named_children():
            setattr(known, name, getattr(model, name))
        object.__setattr__(model, KEPT, known)
    return known


@contextmanager
def head_stays_apart(model: nn.Module) -> Iterator[None]:
    """Inside, transformers does not tie a head to the embeddings that a checkpoint has left apart.

    The configuration of a Flan-T5 says that they are tied (transformers writes so for every T5): to be given more
    embeddings would cost it its head.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    apart = head is not None and head.weight is not model.get_input_embeddings().weight
    said = config.tie_word_embeddings
    config.tie_word_embeddings = said and not apart
    try:
        yield
    finally:
        config.tie_word_embeddings = said


def decoder_start(config: Any) -> int:
    """The id that a decoder's input begins with; it is no part of a reply.

    Raises:
        ConfigError: the configuration names none.
    """
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(
            f"actor_config.model: the configuration of this {config.model_type} names no decoder_start_token_id, so "
            "there is nothing for a reply to start from; write it into the model's config.json"
        )
    return int(start)


def read_by(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a model is called with to try it on some ids, [B, T]: an encoder–decoder gets them on both sides."""
    return {"input_ids": ids, **({"decoder_input_ids": ids} if is_encoder_decoder(config) else {})}
