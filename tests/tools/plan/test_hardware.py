"""Names of devices."""

from __future__ import annotations

import pytest

from chatrlhf.errors import ConfigError
from chatrlhf.tools.plan.hardware import GiB, hardware


@pytest.mark.parametrize(
    "text, name, count, gib",
    [
        ("24GB", "24GB", 1, 24),
        ("4xA100-80GB", "A100-80GB", 4, 80),
        ("8 x a100", "A100-80GB", 8, 80),
        ("NVIDIA GeForce RTX 4090", "RTX4090", 1, 24),
        ("4xT4", "T4", 4, 16),
    ],
)
def test_a_device_by_its_name_or_its_memory(text, name, count, gib):
    found = hardware(text)
    assert (found.device.name, found.count, found.device.memory) == (name, count, gib * GiB)


@pytest.mark.parametrize("text", ["a big one", "0x24GB", ""])
def test_other_names_are_refused(text):
    with pytest.raises((ConfigError, AttributeError)) as refused:
        hardware(text)
    assert refused.type is ConfigError
