"""The weights of a model's folder, read one at a time, and the folder's other files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing
from chatrlhf.models.loading.weight_files import folder_damage, headers
from chatrlhf.runtime.atomic_files import CONTENTS
from chatrlhf.runtime.links import leads_out
from chatrlhf.runtime.whole_folders import require_whole

INDEX = "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".index.json")


class Weights:
    """Tensors by name, in safetensors files or in PyTorch's, which are read without running what they hold."""

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            key: the option that named the folder, for messages.

        Raises:
            ConfigError: there are no weights in it, or a file is damaged.
            WeightsError: a run has left the folder, and it is not what it was.
        """
        self.folder = folder
        require_whole(folder)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            why = "it is no folder" if not folder.is_dir() else "it holds neither *.safetensors nor pytorch_model*.bin"
            raise ConfigError(
                f"{key}: {folder} has no weights ({why}); name the folder of a model in its whole weights"
            )
        if (wrong := folder_damage(folder, [path.name for path in files])) is not None:
            raise ConfigError(f"{key}: the weights in {folder} cannot be read: {wrong}")
        self.files: dict[Path, list[str]] = {path: sorted(headers(path)) for path in files}
        self._file_of = {name: path for path, names in self.files.items() for name in names}
        # The last file stays open: one of PyTorch's is read whole, and neighbors are asked for one after the other.
        self._reader = lru_cache(maxsize=1)(self.reader)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which a hash takes them."""
        return iter(sorted(self._file_of))

    def get(self, name: str) -> Tensor:
        """One of them."""
        return self._reader(self._file_of[name])(name)

    @staticmethod
    def reader(path: Path) -> Callable[[str], Tensor]:
        """What gives the tensors of one file; those of a safetensors file are read when they are asked for."""
        with doing("reading the weights in", path, untrusted=True):
            if path.suffix == ".safetensors":
                return safe_open(path, "pt").get_tensor
            return torch.load(path, map_location="cpu", weights_only=True).__getitem__

    def sha256(self) -> str:
        """Of all names, types, shapes and values; however they are spread over files."""
        return names_sha256(self.hashes())

    def hashes(self) -> dict[str, str]:
        """`tensor_sha256` of each tensor, by name."""
        of_each = {}
        for path, names in self.files.items():
            read = self.reader(path)
            of_each |= {name: tensor_sha256(read(name)) for name in names}
        return of_each


def names_sha256(hashes: dict[str, str]) -> str:
    """Of the hashes of tensors and their names."""
    total = hashlib.sha256()
    for name in sorted(hashes):
        total.update(f"{name}:{hashes[name]}\n".encode())
    return total.hexdigest()


def tensor_sha256(tensor: Tensor) -> str:
    """Of a tensor's type, shape and values."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def copy_other_files(source: Path, target: Path) -> None:
    """Configuration, tokenizer, template and whatever else lies beside weights.

    Raises:
        ConfigError: one is a link out of the folder.
    """
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != CONTENTS:
            refuse_link_out(path, source)
            shutil.copy2(path, target / path.name)


def refuse_link_out(path: Path, folder: Path) -> None:
    """Raise a ConfigError where a file of a model's folder is a link to one elsewhere, which may be anybody's."""
    if leads_out(path, folder):
        raise ConfigError(
            f"{path} is a link to {path.resolve()}, outside of the model's folder; remove it, or put the file there"
        )


def write_index(folder: Path, names_of: dict[str, list[str]]) -> None:
    """transformers' list of which file holds which tensor, where there is more than one."""
    if len(names_of) > 1:
        weight_map = {name: file for file, names in sorted(names_of.items()) for name in names}
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        text = json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
