"""Switches of ChatLLaMA's sections for launchers and adapters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from chatrlhf.config.section import Section


class NotBuiltYet(Section):
    """ChatLLaMA's switches for launchers and adapters; a section says which of them it has."""

    built: ClassVar[tuple[str, ...]] = ()

    deepspeed_enable: bool = False
    deepspeed_config_path: str | None = None
    accelerate_enable: bool = False
    peft_enable: bool = False
    peft_config_path: str | None = None

    @model_validator(mode="after")
    def _refuse_what_is_on(self) -> NotBuiltYet:
        for key in ("deepspeed_enable", "accelerate_enable", "peft_enable"):
            if getattr(self, key) and key not in self.built:
                raise ValueError(f"{key}: True asks for a feature this version does not have yet; set it to False")
        return self
