"""Switches of ChatLLaMA's sections for launchers and adapters."""

from __future__ import annotations

from pydantic import Field, model_validator

from chatrlhf.config.section import Section


class LaunchKeys(Section):
    """Who deals weights, gradients and optimizer states out over processes (for RL, too, `actor_config` says it), and
    whether adapters are trained in the place of weights."""

    deepspeed_enable: bool = Field(False, description="train by DeepSpeed, as deepspeed_config_path says")
    deepspeed_config_path: str | None = Field(
        None, description="DeepSpeed's JSON; null: ds_config.json beside the YAML file, else the bundled one"
    )
    accelerate_enable: bool = Field(
        False, description="train by what `accelerate launch` was configured for: DDP, FSDP2 or DeepSpeed"
    )

    peft_enable: bool = Field(False, description="train adapters, as peft_config_path says")
    peft_config_path: str | None = None

    @model_validator(mode="after")
    def _one_launcher(self) -> LaunchKeys:
        if self.deepspeed_enable and self.accelerate_enable:
            raise ValueError(
                "deepspeed_enable: True and accelerate_enable: True both say who deals out the weights; set one to "
                "False (accelerate, too, can run DeepSpeed: then its own configuration file says so)"
            )
        return self
