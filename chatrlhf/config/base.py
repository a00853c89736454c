"""What every part of the configuration has in common."""

from __future__ import annotations

from math import isqrt
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from chatrlhf.config.plain_values import check_plain


def must_divide(name: str, value: int, by_name: str, by: int) -> None:
    """Refuse a remainder and name the values that would work, rather than drop rows in silence."""
    if value % by == 0:
        return
    below, above = value // by * by, (value // by + 1) * by
    working = f"{below} or {above}" if below else f"{above}"
    low = [d for d in range(1, isqrt(value) + 1) if value % d == 0]
    divisors = {*low, *(value // d for d in low)}
    near = sorted(divisors, key=lambda d: (abs(d - by), d))[:3]
    raise ValueError(
        f"{name}: {value} is not divisible by {by_name} ({by}); set {name} to {working}, "
        f"or {by_name} to one of {', '.join(map(str, sorted(near)))}"
    )


def check_micro_batch(section: Any) -> None:
    """Gradient accumulation takes whole microbatches."""
    refuse_larger("micro_batch_size", section.micro_batch_size, "batch_size", section.batch_size)
    if section.micro_batch_size is not None and section.micro_batch_size < section.batch_size:
        must_divide("batch_size", section.batch_size, "micro_batch_size", section.micro_batch_size)


def refuse_larger(name: str, value: int | None, by_name: str, most: int | None) -> None:
    """Refuse a value above another one; a key that is null says nothing. Raises ValueError."""
    if value is not None and most is not None and value > most:
        raise ValueError(f"{name}: {value} is more than {by_name} ({most}); lower it, or raise {by_name}")


def refuse_checkpoint_name(section: Any) -> None:
    """ChatLLaMA starts from a named checkpoint; here the newest valid one is found."""
    if section.checkpoint_name is not None:
        raise ValueError(
            f"checkpoint_name: {section.checkpoint_name!r} is not used; --resume continues from the newest valid "
            "checkpoint, and a model's folder can be named as model; set checkpoint_name to null"
        )


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, assignments are checked."""

    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        check_plain(info.field_name, value, cls.model_fields[info.field_name].annotation)
        return value
