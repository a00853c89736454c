"""Launch facts and reductions over ranks. One process is one rank; several are refused until RL splits over them."""

from __future__ import annotations

import os

from chatrlhf.errors import UserError


def world_size() -> int:
    """Processes of this launch, as torchrun and accelerate announce them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def require_single_process() -> None:
    """Refuse a launch over several processes rather than train the same model several times."""
    if world_size() > 1:
        raise UserError(
            f"launched with {world_size()} processes (WORLD_SIZE), but this version trains in one; "
            "start it with plain python"
        )
