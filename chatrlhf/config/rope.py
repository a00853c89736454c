"""How rotary positions are stretched, so that a model reads more tokens than it was made for."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from chatrlhf.config.section import Section

THEIR_NAMES = {"rope_type": "type", "scale": "factor"}  # transformers' and OpenAssistant's
OF_YARN = ("attention_factor", "beta_fast", "beta_slow")


class RopeScaling(Section):
    """`rope_scaling` by transformers' names; OpenAssistant's `superhot` is the same.

    ``linear`` divides positions by the factor (Chen et al. 2023, "Extending context window of large language models via
    positional interpolation"), ``yarn`` does so for low frequencies only (Peng et al. 2023), ``dynamic`` raises theta
    with the length of what is read; ``default`` changes theta alone.
    """

    type: Literal["linear", "dynamic", "yarn", "default"]
    factor: float | None = Field(None, gt=1, description="the context becomes so many times the original one")
    original_max_position_embeddings: int | None = Field(None, ge=1, description="tokens; null: the model's own")
    rope_theta: float | None = Field(None, gt=0, description="base of the frequencies; null: the model's own")
    attention_factor: float | None = Field(None, gt=0, description="yarn: of attention's logits; null: by the factor")
    beta_fast: float | None = Field(None, gt=0, description="yarn: turns from which frequencies stay as they are")
    beta_slow: float | None = Field(None, gt=0, description="yarn: turns below which they are divided by the factor")

    @model_validator(mode="before")
    @classmethod
    def _as_others_write_it(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for theirs, ours in THEIR_NAMES.items():
            if theirs in values and ours in values:
                raise ValueError(f"{theirs} and {ours} are one setting; keep one of them")
        return {THEIR_NAMES.get(name, name): value for name, value in values.items()}

    @model_validator(mode="after")
    def _what_belongs_together(self) -> RopeScaling:
        if self.type == "default":
            if self.factor is not None or self.rope_theta is None:
                raise ValueError("type: 'default' changes rope_theta alone; give that and no factor, or another type")
        elif self.factor is None:
            raise ValueError(f"factor: type {self.type!r} needs one; the context becomes so many times as long")
        for name in OF_YARN:
            if getattr(self, name) is not None and self.type != "yarn":
                raise ValueError(f"{name} belongs to type 'yarn', not to {self.type!r}")
        return self
