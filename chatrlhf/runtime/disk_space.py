"""Free disk space, compared before a stage with what it is going to write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from torch import nn

from chatrlhf.errors import UserError

ADAM_BYTES = 8  # of a trained parameter: two moments in float32


def check_room(
    folder: Path, stage: str, model: nn.Module, keep: int, resume: bool, warn: Callable[[str], None]
) -> None:
    """Compare the free space with what a stage is about to write: checkpoints, each with Adam's state, and the model.

    Args:
        folder: below it everything is written.
        keep: how many checkpoints are kept.
        resume: some are there already.

    Raises:
        UserError: one checkpoint and the trained model do not fit; where all checkpoints do not, there is a warning.
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    weights = sum(weight.numel() * weight.element_size() for weight in trained)
    checkpoint = weights + ADAM_BYTES * sum(weight.numel() for weight in trained)
    least, most = checkpoint + weights, (keep + 1) * checkpoint + weights  # one is written before the oldest is removed
    free = shutil.disk_usage(folder).free
    if free < least and not resume:
        raise UserError(
            f"{stage}: {folder} has {gigabytes(free)} free, and a checkpoint with the trained model needs at least "
            f"{gigabytes(least)}; make room there, or set output_dir to another disk"
        )
    if free < most:
        warn(
            f"{stage}: {folder} has {gigabytes(free)} free, and {keep} checkpoints with the trained model need up to "
            f"{gigabytes(most)}; make room there, or lower n_checkpoints_to_keep"
        )


def gigabytes(number: int) -> str:
    """A number of bytes, for people."""
    return f"{number / 1e9:.3g} GB"
