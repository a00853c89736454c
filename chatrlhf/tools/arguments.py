"""Kinds of values that the commands take."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from functools import reduce


def whole_number(least: int) -> Callable[[str], int]:
    """A whole number, not below ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return int(text)

    return read


UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Seconds of a text such as 3h50m, 90s, 1d or 03:50:00."""
    if re.fullmatch(r"\d+(:\d\d){1,2}", text):
        seconds = reduce(lambda total, part: 60 * total + int(part), text.split(":"), 0)
        return float(seconds if text.count(":") == 2 else 60 * seconds)
    if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 3h50m, 90s, 1d or 03:50:00")
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd])", text))
