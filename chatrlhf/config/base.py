"""What every part of the configuration has in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


def must_divide(name: str, value: int, by_name: str, by: int) -> None:
    """Refuse a remainder and name the values that would work, rather than drop rows in silence."""
    if value % by == 0:
        return
    below, above = value // by * by, (value // by + 1) * by
    working = f"{below} or {above}" if below else f"{above}"
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    near = sorted(divisors, key=lambda d: (abs(d - by), d))[:3]
    raise ValueError(
        f"{name}: {value} is not divisible by {by_name} ({by}); set {name} to {working}, "
        f"or {by_name} to one of {', '.join(map(str, sorted(near)))}"
    )


def check_micro_batch(section: Any) -> None:
    """Gradient accumulation takes whole microbatches."""
    if section.micro_batch_size is not None and section.micro_batch_size < section.batch_size:
        must_divide("batch_size", section.batch_size, "micro_batch_size", section.micro_batch_size)


def refuse_checkpoint_name(section: Any) -> None:
    """ChatLLaMA starts from a named checkpoint; here the newest valid one is found."""
    if section.checkpoint_name is not None:
        raise ValueError(
            f"checkpoint_name: {section.checkpoint_name!r} is not used; --resume continues from the newest valid "
            "checkpoint, and a model's folder can be named as model; set checkpoint_name to null"
        )


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
