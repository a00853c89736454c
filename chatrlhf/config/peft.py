"""Low-rank adapters, as the file that `peft_config_path` names describes them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from chatrlhf.config.section import Section


class PeftConfig(Section):
    """The file that `peft_config_path` names: low-rank adapters, by peft's names."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: Literal["CAUSAL_LM", "SEQ_2_SEQ_LM"] | None = Field(None, description="null: what the model is")
    inference_mode: Literal[False] = False
    r: int = Field(8, ge=1, description="rank")
    lora_alpha: int = Field(32, ge=1, description="what the adapters add is scaled by lora_alpha / r")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="off in RL, where a fresh policy has to be its reference")
    bias: Literal["none"] = "none"
    target_modules: list[str] | str | None = Field(
        None, description="null: the family's usual layers; 'all': each linear one"
    )

    @field_validator("target_modules")
    @classmethod
    def _pefts_name(cls, modules: list[str] | str | None) -> list[str] | str | None:
        return "all-linear" if modules in ("all", ["all"]) else modules
