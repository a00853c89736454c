"""Provenance of a run: code, packages and hardware, which its bits depend on beside data and settings."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from chatrlhf.runtime.collectives import world_size

PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
# What may take part in training where it is installed.
OPTIONAL = ("numpy", "peft", "deepspeed", "bitsandbytes", "flash-attn", "vllm", "triton")
PACKAGE = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """This package, those it is built on, those that may take part, and Python."""
    known = {name: _version(name) for name in ("chatrlhf", *PACKAGES)}
    present = {name: version for name in OPTIONAL if (version := _version(name)) is not None}
    return known | present | {"python": platform.python_version()}


@lru_cache(maxsize=1)
def code() -> dict[str, str | None]:
    """The package's sources by one hash, and the commit where they are a checkout of git; edits change the hash."""
    return {"sha256": _sources(PACKAGE), "commit": commit_of(PACKAGE.parent)}


def hardware(threads: int | None = None) -> dict[str, Any]:
    """What computes.

    Args:
        threads: of a process; None: as PyTorch has it.
    """
    on_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cpu": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads or torch.get_num_threads(),
        "processes": world_size(),
        "system": platform.platform(),
    }


def commit_of(checkout: Path) -> str | None:
    """The commit that a checkout of git is at, read from its files; None where it is none."""
    try:
        git = checkout / ".git"
        if git.is_file():  # of a further work tree, whose folder it names
            git = checkout / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref:"):
            return head
        name = head.removeprefix("ref:").strip()
        common = git / "commondir"
        shared = git / common.read_text(encoding="utf-8").strip() if common.is_file() else git
        for place in (git / name, shared / name):
            if place.is_file():
                return place.read_text(encoding="utf-8").strip()
        packed = (shared / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, ValueError):
        return None


def _sources(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(f"{path.relative_to(folder)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _processor() -> str:
    """The model's name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.machine())}, {os.cpu_count()} cores"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
