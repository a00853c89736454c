"""Disk that a run writes to: whether its folder can be made and written, and whether there is room for the results."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import nn

from chatrlhf.config.schema import Config
from chatrlhf.errors import ConfigError, UserError

MODEL_FOLDER = "actor_config.model_folder"  # ChatLLaMA's name
ADAM_BYTES = 8  # of a trained parameter: two moments in float32


def check_output_dir(config: Config) -> None:
    """Make sure that the run's folder can be made and written to; what is made for that is removed again.

    Raises:
        ConfigError: it cannot, or it is the folder of a model; the key is named.
    """
    folder = config.run_dir
    key = "output_dir" if config.output_dir is not None or config.actor_config.model_folder is None else MODEL_FOLDER
    try:
        _try_to_write(folder)
    except (OSError, ValueError) as error:  # ValueError: a null character
        in_the_way = [path for path in (folder, *folder.parents) if os.path.isfile(path)]
        reason = f"{in_the_way[0]} is a file" if in_the_way else getattr(error, "strerror", None) or error
        raise ConfigError(f"{key}: nothing can be written to {str(folder)!r} ({reason}); name another folder") from None
    for section in ("actor_config", "reward_config", "critic_config"):
        model = getattr(config, section).model
        if model is not None and os.path.isdir(model) and folder.is_dir() and folder.samefile(model):
            raise ConfigError(f"{key}: {str(folder)!r} is the folder of {section}.model; name another for the results")


def _try_to_write(folder: Path) -> None:
    made: list[Path] = []
    try:
        for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
            missing.mkdir()
            made.append(missing)
        with tempfile.TemporaryFile(dir=folder):
            pass
    finally:
        for each in reversed(made):
            with suppress(OSError):
                each.rmdir()


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
            f"{stage}: {folder} has {_gigabytes(free)} free, and a checkpoint with the trained model needs at least "
            f"{_gigabytes(least)}; make room there, or set output_dir to another disk"
        )
    if free < most:
        warn(
            f"{stage}: {folder} has {_gigabytes(free)} free, and {keep} checkpoints with the trained model need up to "
            f"{_gigabytes(most)}; make room there, or lower n_checkpoints_to_keep"
        )


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.3g} GB"
