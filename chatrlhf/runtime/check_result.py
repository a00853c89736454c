"""Result of one check: what was measured, whether that is well, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from chatrlhf.errors import UserError, one_line

Status = Literal["pass", "warn", "fail"]


@dataclass(frozen=True)
class CheckResult:
    """One line of `chatrlhf check`."""

    name: str
    status: Status
    measured: str
    remedy: str = ""  # "" where nothing is to be done

    @property
    def line(self) -> str:
        """As a warning of a run."""
        return f"{self.name}: {self.measured}" + (f"; {self.remedy}" if self.remedy else "")


def judged(name: str, measured: str, remedy: str, warn: bool = False, fail: bool = False) -> CheckResult:
    """A result, whose remedy is told only where something is wrong."""
    if not (warn or fail):
        return CheckResult(name, "pass", measured)
    return CheckResult(name, "fail" if fail else "warn", measured, remedy)


def failed(name: str, error: UserError) -> CheckResult:
    """A refusal: its line says what is wrong and, behind the last semicolon, what to do."""
    text = one_line(error, limit=1000)
    measured, semicolon, remedy = text.rpartition("; ")
    return CheckResult(name, "fail", measured, remedy) if semicolon else CheckResult(name, "fail", text)
