"""What the disk, the file system and the limits of a process must give a run, asked before anything is loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from chatrlhf.errors import ConfigError
from chatrlhf.runtime.disk_space import ADAM_BYTES, gigabytes

LEAST_WEIGHT_BYTES = 2  # of a weight, in the narrowest type that is trained
SHARD_BYTES = 5 * 10**9  # a model's weights are written in files that are no larger
FILES_OF_STAGE = 20  # a checkpoint and a result with tokenizer, at the least
LOG_BYTES = 2**16  # manifest and logs of the smallest run


def check_start(folder: Path, key: str, weights: Mapping[str, int], is_sharded: bool) -> None:
    """Compare what is free with the least that a run writes. Where nothing is known of a model, it counts as nothing.

    Args:
        folder: of the run; it need not be there yet.
        key: that names the folder.
        weights: how many weights each stage trains, by its name; at least one stage.
        is_sharded: optimizers write their state in parts.

    Raises:
        ConfigError: bytes, files or the permitted size of a file do not suffice.
    """
    place = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
    stages, total = " and ".join(weights), sum(weights.values())
    # A stage leaves its result, and a checkpoint of the weights with the optimizer's moments.
    least = total * (2 * LEAST_WEIGHT_BYTES + ADAM_BYTES) + LOG_BYTES
    free = shutil.disk_usage(place).free
    if free < least:
        raise ConfigError(
            f"{key}: the disk of {str(folder)!r} has {gigabytes(free)} free, and checkpoints and results of {stages} "
            f"need at least {gigabytes(least)}; make room there, or name a folder on another disk"
        )
    if not hasattr(os, "statvfs"):  # Windows has neither inodes nor such limits
        return
    files, system = FILES_OF_STAGE * len(weights), os.statvfs(place)
    if system.f_files and system.f_favail < files:  # some file systems have no such bound, and say 0
        raise ConfigError(
            f"{key}: the disk of {str(folder)!r} can take {system.f_favail} more files (inodes), and {stages} write at "
            f"least {files}; remove files there, or name a folder on another disk"
        )
    largest = max(LOG_BYTES, *(min(each * LEAST_WEIGHT_BYTES, SHARD_BYTES) for each in weights.values()))
    if not is_sharded:
        largest = max(largest, ADAM_BYTES * max(weights.values()))
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit not in (resource.RLIM_INFINITY, -1) and limit < largest:
        raise ConfigError(
            f"{key}: this process may write files of at most {gigabytes(limit)}, and {stages} write one of at least "
            f"{gigabytes(largest)}; raise the limit (ulimit -f unlimited)"
        )
