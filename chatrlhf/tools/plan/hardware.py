"""Devices by name: their memory, what they compute at most, how fast they read."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

from chatrlhf.errors import ConfigError

GB, GiB = 10**9, 2**30


@dataclass(frozen=True)
class Device:
    """One device of a kind. A vendor's "24 GB" card has 24 GiB."""

    name: str
    memory: float  # bytes
    peak: float | None = None  # FLOP/s of dense products in 16 bit with float32 sums; None: not known
    peak_fp32: float | None = None  # the same in float32
    bandwidth: float | None = None  # bytes/s
    bf16: bool = True  # whether it has bfloat16
    type: str = "cuda"


def _gpu(name: str, gib: float, peak: float, fp32: float, gb_a_second: float, bf16: bool = True) -> Device:
    return Device(name, gib * GiB, peak * 1e12, fp32 * 1e12, gb_a_second * GB, bf16)


# Of the vendor's data sheets, without sparsity; float32 is that of CUDA cores, since TF32 is off unless asked for.
DEVICES = {
    each.name: each
    for each in (
        _gpu("T4", 16, 65, 8.1, 320, bf16=False),
        _gpu("V100-32GB", 32, 125, 15.7, 900, bf16=False),
        _gpu("RTX3090", 24, 71, 35.6, 936),
        _gpu("RTX4090", 24, 165, 82.6, 1008),
        _gpu("L4", 24, 121, 30.3, 300),
        _gpu("A10", 24, 125, 31.2, 600),
        _gpu("A6000", 48, 155, 38.7, 768),
        _gpu("L40S", 48, 362, 91.6, 864),
        _gpu("A100-40GB", 40, 312, 19.5, 1555),
        _gpu("A100-80GB", 80, 312, 19.5, 2039),
        _gpu("H100-80GB", 80, 989, 67, 3350),
        _gpu("H200", 141, 989, 67, 4800),
        _gpu("B200", 180, 2250, 75, 7700),
    )
}
ALIASES = {"A100": "A100-80GB", "H100": "H100-80GB", "V100": "V100-32GB", "3090": "RTX3090", "4090": "RTX4090"}


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind."""

    device: Device
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.count} x {self.device.name}" if self.count > 1 else self.device.name


def hardware(text: str) -> Hardware:
    """Of a name: ``24GB`` (any GPU with so much memory), ``RTX4090``, ``4xA100-80GB``.

    Raises:
        ConfigError: there is no such device.
    """
    count, name = re.fullmatch(r"(?:(\d+)\s*[xX]\s*)?(.*)", text.strip()).groups()
    number = int(count or 1)
    if number < 1:
        raise ConfigError(f"--gpu {text!r}: at least one device is needed")
    wanted = re.sub(r"(?i)nvidia|geforce", "", name).replace(" ", "").upper()
    known = {each.upper(): device for each, device in DEVICES.items()}
    known |= {alias: DEVICES[each] for alias, each in ALIASES.items()}
    if wanted in known:
        return Hardware(known[wanted], number)
    if size := re.fullmatch(r"(\d+(?:\.\d+)?)(?:GI?B)", wanted):
        return Hardware(Device(f"{size[1]}GB", float(size[1]) * GiB), number)
    raise ConfigError(f"--gpu {text!r}: give a size such as 24GB, or one of {', '.join(DEVICES)}, with 4x before it")


def this_machine() -> Hardware:
    """The GPUs of this machine, or its processor and memory."""
    import torch

    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        near = next((each for each in DEVICES.values() if each.name.split("-")[0] in about.name.replace(" ", "")), None)
        device = Device(about.name, about.total_memory) if near is None else replace(near, memory=about.total_memory)
        return Hardware(device, torch.cuda.device_count())
    import psutil

    rate = _measured_rate()
    return Hardware(Device("this machine's CPU", psutil.virtual_memory().total, rate, rate, None, type="cpu"))


def _measured_rate() -> float:
    """FLOP/s of a float32 product of a thousand rows, in a twentieth of a second."""
    import torch

    size, calls = 1024, 0
    first, second = torch.ones(size, size), torch.ones(size, size)
    first @ second
    began = time.perf_counter()
    while time.perf_counter() - began < 0.05:
        first @ second
        calls += 1
    return 2 * size**3 * calls / (time.perf_counter() - began)
