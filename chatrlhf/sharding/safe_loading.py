"""Reading sharded states without running what they hold: DeepSpeed and PyTorch's distributed checkpoints are unpickled.

Both ask `torch.load` for any object; inside `known_objects` they get tensors and a few classes that hold none of
anybody's code. The list of a distributed checkpoint's shards is a bare pickle, which is looked at beforehand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.pickled_files import names_in
from chatrlhf.sharding.deepspeed import classes_in_states

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # in the environment; stronger than what a library asks for
SHARD_LIST = ".metadata"
# What PyTorch writes into a list of shards, with the modules that these come from.
IN_SHARD_LIST = frozenset(
    [f"torch.distributed.checkpoint.metadata.{name}" for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )]
    + ["torch.distributed.checkpoint.filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size"]
    + [f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8")]
    + [f"torch.{name}" for name in ("uint8", "bool", "device", "strided")]
    + ["pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"]
    + ["collections.OrderedDict"]
)  # fmt: skip


@contextmanager
def known_objects(folder: Path) -> Iterator[None]:
    """Inside, whatever reads the sharded states of a checkpoint gets tensors and known classes, or an error.

    Raises:
        CheckpointError: a list of shards names something else, which would be called when it is read.
    """
    for path in sorted(folder.rglob(SHARD_LIST)):
        _check(path)
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(classes_in_states()):
            yield
    finally:
        os.environ.pop(FORCED)
        if before is not None:
            os.environ[FORCED] = before


def _check(path: Path) -> None:
    try:
        foreign = sorted(names_in(path) - IN_SHARD_LIST)
    except ValueError as error:
        raise CheckpointError(f"{path}: it is damaged ({error}); resume from another checkpoint") from None
    if foreign:
        raise CheckpointError(
            f"{path}: it holds {foreign[0]}, which would run when it is read; resume from a checkpoint that you trust"
        )
