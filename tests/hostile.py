"""What an attacker puts into files: pickles that act when they are read, and how to see that they did not."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chatrlhf.errors import UserError
from chatrlhf.errors.boundary import line_of


class Payload:
    """When it is unpickled, a folder is made: what an attacker would do instead is left to him."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def torch_file(path: Path, proof: Path) -> None:
    """As `torch.save` writes one, with a payload among its tensors."""
    torch.save(OrderedDict(weight=torch.zeros(2), evil=Payload(proof)), path)


def old_torch_file(path: Path, proof: Path) -> None:
    """As PyTorch wrote them before version 1.6."""
    torch.save(OrderedDict(evil=Payload(proof)), path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, proof: Path) -> None:
    path.write_bytes(pickle.dumps({"evil": Payload(proof)}))


WRITERS: dict[str, Callable[[Path, Path], None]] = {
    "torch.save": torch_file,
    "old torch.save": old_torch_file,
    "pickle": bare_pickle,
}


def line_about(call: Callable[[], Any]) -> str:
    """The one line that a user gets of what is refused."""
    try:
        call()
    except UserError as error:
        line = line_of(error)
        assert "\n" not in line and len(line) < 1000
        return line
    raise AssertionError("it was not refused")
