"""Layout of sharded states in a checkpoint: written beside them, compared before they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.collectives import world_size
from chatrlhf.sharding.accelerate_env import Sharding

SHARDING = "sharding.json"  # beside states that lie as they were sharded


def write_sharding(folder: Path, sharding: Sharding) -> None:
    """Write down how the states in a checkpoint are sharded, where they are."""
    if sharding is not None:
        (folder / SHARDING).write_text(json.dumps(_described(sharding)) + "\n", encoding="utf-8")


def check_sharding(folder: Path, sharding: Sharding) -> None:
    """Refuse a checkpoint whose states were sharded in another way: DeepSpeed cannot reshard them.

    Raises:
        CheckpointError: it says how it was.
    """
    path = folder / SHARDING
    there = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    wanted = _described(sharding) if sharding is not None else None
    if there != wanted:
        one, other = (f"{each['by']} in {each['processes']} processes" if each else "whole" for each in (there, wanted))
        raise CheckpointError(
            f"{folder}: its states were written {one}, and this run has them {other}; resume with the launch and the "
            "configuration that it was written by, or start again without --resume"
        )


def _described(sharding: Sharding) -> dict[str, Any]:
    return {"by": str(sharding), "processes": world_size()}
