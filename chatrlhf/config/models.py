"""How a model is loaded and held: keys that every section with a model of its own has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chatrlhf.config.section import Section

Attention = Literal["sdpa", "flash_attention_2", "eager"]


class ModelKeys(Section):
    """By transformers' names where it has them."""

    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: Attention | None = Field(
        None, description="null: PyTorch's fused attention, and in RL this package's, which takes packed rows"
    )
    resize_embeddings: bool = Field(
        False, description="a tokenizer with more tokens than the model has embeddings gets the rows that are missing"
    )
    froze_embeddings: bool = False
    gradient_checkpointing: bool = Field(False, description="activations are computed again, not kept")
