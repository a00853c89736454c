"""How a model is loaded and held: keys that every section with a model of its own has."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from chatrlhf.config.base import Section
from chatrlhf.config.plain_values import MAX_TOKENS


class QuantizationKeys(Section):
    """The weights that these keys make small are frozen, and adapters are trained on them."""

    load_in_4bit: bool = Field(False, description="weights of 4 bits under adapters (QLoRA), by bitsandbytes")
    load_in_8bit: bool = Field(False, description="weights of 8 bits under adapters, by bitsandbytes")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field("nf4", description="type of the 4 bits")
    bnb_4bit_use_double_quant: bool = Field(False, description="the scales of the weights are made small, too")
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of the products; null: bfloat16 where the stage computes in that, float32 elsewhere"
    )

    @property
    def is_quantized(self) -> bool:
        """Whether weights are loaded quantized."""
        return self.load_in_4bit or self.load_in_8bit

    @model_validator(mode="after")
    def _one_way(self) -> QuantizationKeys:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: weights have one of these sizes; set one to False")
        if self.is_quantized and not getattr(self, "peft_enable", True):
            raise ValueError(
                "load_in_4bit and load_in_8bit: quantized weights cannot be trained; set peft_enable to True, "
                "and adapters are trained on them"
            )
        return self


class PeftConfig(Section):
    """The file that `peft_config_path` names: low-rank adapters, by peft's names."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] | None = Field(None, description="null: what the model is")
    inference_mode: Literal[False] = False
    r: int = Field(8, ge=1, le=10**5, description="rank")
    lora_alpha: int = Field(32, ge=1, le=10**6, description="what the adapters add is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="off in RL, where a fresh policy has to be its reference")
    bias: Literal["none"] = "none"
    target_modules: list[str] | str | None = Field(
        None, description="null: the family's usual layers; 'all': each linear one"
    )

    @field_validator("target_modules")
    @classmethod
    def _pefts_name(cls, modules: list[str] | str | None) -> list[str] | str | None:
        return "all-linear" if modules in ("all", ["all"]) else modules


THEIR_NAMES = {"rope_type": "type", "scale": "factor"}  # transformers' and OpenAssistant's
OF_YARN = ("attention_factor", "beta_fast", "beta_slow")


class RopeScaling(Section):
    """`rope_scaling` by transformers' names; OpenAssistant's `superhot` is the same.

    ``linear`` divides positions by the factor (Chen et al. 2023, "Extending context window of large language models via
    positional interpolation"), ``yarn`` does so for low frequencies only (Peng et al. 2023), ``dynamic`` raises theta
    with the length of what is read; ``default`` changes theta alone.
    """

    type: Literal["linear", "dynamic", "yarn", "default"] = Field(
        description="linear, dynamic, yarn, or default, which changes rope_theta alone"
    )
    factor: float | None = Field(None, gt=1, le=10**5, description="the context becomes so many times the original one")
    original_max_position_embeddings: int | None = Field(
        None, ge=1, le=MAX_TOKENS, description="tokens; null: the model's own"
    )
    rope_theta: float | None = Field(
        None, gt=0, le=10**15, description="base of the frequencies; null: the model's own"
    )
    attention_factor: float | None = Field(
        None, gt=0, le=1000, description="yarn: of attention's logits; null: by the factor"
    )
    beta_fast: float | None = Field(
        None, gt=0, le=10**6, description="yarn: turns from which frequencies stay as they are"
    )
    beta_slow: float | None = Field(
        None, gt=0, le=10**6, description="yarn: turns below which they are divided by the factor"
    )

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


Attention = Literal["sdpa", "flash_attention_2", "eager"]


class ModelKeys(Section):
    """By transformers' names where it has them."""

    revision: str | None = Field(None, description="commit, branch or tag of a model of the hub")
    trust_remote_code: bool = Field(False, description="run the model's own Python code; never unless asked")
    attn_implementation: Attention | None = Field(
        None, description="null: PyTorch's fused attention, and in RL this package's, which takes packed rows"
    )
    resize_embeddings: bool = Field(
        False, description="a tokenizer with more tokens than the model has embeddings gets the rows that are missing"
    )
    froze_embeddings: bool = Field(False, description="embeddings are not trained")
    gradient_checkpointing: bool = Field(False, description="activations are computed again, not kept")
