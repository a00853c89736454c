"""What every part of the configuration has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

BEYOND = 2**63  # PyTorch's and Python's own counters end here


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_number_beyond_64_bits(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, int) and abs(value) >= BEYOND:
                raise ValueError(f"{name} has {len(str(abs(value)))} digits; give a number below {BEYOND:.1e}")
        return values
