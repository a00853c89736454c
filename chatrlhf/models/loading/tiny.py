"""A model created on the fly, for a start without any download."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from chatrlhf.config.model import RopeScaling
from chatrlhf.config.schema import TinyConfig
from chatrlhf.models.loading.rope import stretch_positions

TINY = "tiny"


def tiny_model(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None = None) -> nn.Module:
    """A small Llama for a tokenizer, with random weights from torch's generator."""
    return LlamaForCausalLM(tiny_settings(config, tokenizer, scaling))


def tiny_settings(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None) -> LlamaConfig:
    """The configuration of `tiny_model`."""
    intermediate = config.intermediate_size or -(-config.hidden_size * 8 // 3 // 32) * 32
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if scaling is not None:
        stretch_positions(settings, scaling, "actor_config.rope_scaling")
    return settings
