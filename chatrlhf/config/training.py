"""How weights are stepped and in which precision: keys that all three stages have."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from chatrlhf.config.base import Section
from chatrlhf.config.plain_values import MAX_STEPS


class LaunchKeys(Section):
    """Who deals weights, gradients and optimizer states out over processes (for RL, too, `actor_config` says it), and
    whether adapters are trained instead of weights."""

    deepspeed_enable: bool = Field(False, description="train by DeepSpeed, as deepspeed_config_path says")
    deepspeed_config_path: str | None = Field(
        None, description="DeepSpeed's JSON; null: ds_config.json beside the YAML file, else the bundled one"
    )
    accelerate_enable: bool = Field(
        False, description="train by what `accelerate launch` was configured for: DDP, FSDP2 or DeepSpeed"
    )

    peft_enable: bool = Field(False, description="train adapters, as peft_config_path says")
    peft_config_path: str | None = Field(
        None, description="a YAML file of peft's LoRA keys; null: the defaults, or the actor's"
    )

    @model_validator(mode="after")
    def _one_launcher(self) -> LaunchKeys:
        if self.deepspeed_enable and self.accelerate_enable:
            raise ValueError(
                "deepspeed_enable: True and accelerate_enable: True both say who shards the weights; set one to "
                "False (accelerate, too, can run DeepSpeed: then its own configuration file says so)"
            )
        return self


Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


class OptimizerKeys(Section):
    """AdamW, its schedule and gradient clipping; the same keys in all three stages."""

    lr_scheduler: Scheduler = Field("linear", description="shape of the learning rate over the stage")
    warmup_steps: int = Field(0, ge=0, le=MAX_STEPS, description="optimizer steps")
    weight_decay: float = Field(0.0, ge=0, le=10, description="AdamW's")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW's")
    max_grad_norm: float | None = Field(1.0, gt=0, le=10**6, description="null: no clipping")

    @field_validator("betas")
    @classmethod
    def _betas_in_unit_interval(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"each must be in [0, 1), got {list(betas)}")
        return betas
