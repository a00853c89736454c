"""Weights in few bits under adapters (QLoRA, Dettmers et al. 2023), by transformers' and bitsandbytes' names."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from chatrlhf.config.section import Section


class QuantizationKeys(Section):
    """The weights that these keys make small are frozen, and adapters are trained upon them."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = Field(False, description="the scales of the weights are made small, too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the products; null: bfloat16 where the stage computes in that, float32 elsewhere"
    )

    @property
    def is_quantized(self) -> bool:
        """Whether weights are loaded in few bits."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _one_way(self) -> QuantizationKeys:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: weights have one of these sizes; set one to False")
        if self.is_quantized and not getattr(self, "peft_enable", True):
            raise ValueError(
                "load_in_4bit and load_in_8bit: weights in few bits cannot be trained; set peft_enable to True, "
                "and adapters are trained upon them"
            )
        return self
