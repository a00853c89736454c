"""Weight files of a model or of adapters: the tensors in their headers, and what is wrong with a damaged file."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import safe_open

from chatrlhf.errors import one_line

LFS = b"version https://git-lfs"  # how a git-lfs pointer begins
INDEX = ".index.json"
# In the order in which transformers and peft look for them; the first kind that is there is what they read.
MODEL_FILES = ("model.safetensors", "model-*-of-*.safetensors", "pytorch_model.bin", "pytorch_model-*-of-*.bin")
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
AGAIN, SAFE = "copy or download it again", "save the tensors alone, as safetensors"


class Header(NamedTuple):
    """What a file says of a tensor before its values are read."""

    shape: tuple[int, ...]
    is_floating: bool


def local_folder(name: str, revision: str | None = None) -> Path | None:
    """The folder of a model, of a hub id its snapshot in the cache; None where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError, OSError, ValueError):
        return None


def weight_files(folder: Path, patterns: Iterable[str] = MODEL_FILES) -> list[Path]:
    """The files that a model, or adapters, are read from."""
    return next((paths for pattern in patterns if (paths := sorted(folder.glob(pattern)))), [])


def headers(path: Path) -> dict[str, Header]:
    """The tensors of one file by name; nothing is read of their values.

    Raises:
        What safetensors and torch raise on a file that is damaged; see `damage`.
    """
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {name: _header(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118, it is no dictionary
    content = torch.load(path, map_location="meta", weights_only=True)
    if not isinstance(content, Mapping):
        raise TypeError(f"holds a {type(content).__name__}, not a dictionary of tensors")
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return {name: Header(tuple(value.shape), value.is_floating_point()) for name, value in tensors.items()}


def folder_damage(folder: Path, patterns: Iterable[str] = MODEL_FILES) -> str | None:
    """What is wrong with the weight files of a folder, and the remedy; None where all of them can be read."""
    files = weight_files(folder, patterns)
    # A file that holds the whole model is read instead of the shards that a list names.
    indexes = [] if files and "-of-" not in files[0].name else sorted(folder.glob(f"*{INDEX}"))
    faults = [*map(_index_damage, indexes), *map(damage, files)]
    return next((fault for fault in faults if fault is not None), None)


def damage(path: Path) -> str | None:
    """What is wrong with one weight file, and the remedy; None where its header can be read."""
    if not path.is_file():
        return f"{path.name} is not there, or is no file; {AGAIN}"
    size = path.stat().st_size
    if size == 0:
        return f"{path.name} is empty (0 bytes); {AGAIN}"
    with path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return f"{path.name} is a git-lfs pointer, not the weights; run git lfs pull in its repository"
    if (wrong := archive_fault(path)) is not None:
        return wrong
    try:
        headers(path)
    except pickle.UnpicklingError:
        if zipfile.is_zipfile(path):  # a PyTorch file in good order
            return f"{path.name} holds other objects than tensors, which could run code when they are read; {SAFE}"
        return f"{path.name} is no PyTorch file, or damaged ({size:,} bytes); {AGAIN}"
    except Exception as error:  # safetensors, zip and pickle readers raise whatever a damaged file brings about
        return f"{path.name} is damaged or cut short ({size:,} bytes: {one_line(error)}); {AGAIN}"
    return None


def archive_fault(path: Path) -> str | None:
    """What is wrong with a PyTorch file that unpacks to more than it has, and the remedy; PyTorch compresses none."""
    if path.suffix == ".safetensors" or not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return None  # said by whoever reads it
    size = path.stat().st_size
    if unpacked <= size:
        return None
    return f"{path.name} has {size:,} bytes and unpacks to {unpacked:,}, which PyTorch's files never do; {SAFE}"


def _header(piece: Any) -> Header:
    return Header(tuple(piece.get_shape()), piece.get_dtype().startswith(("F", "BF")))


def _index_damage(index: Path) -> str | None:
    """What is wrong with a list of shards."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{index.name} is no list of shards ({one_line(error)}); {AGAIN}"
    if elsewhere := sorted(shard for shard in shards if Path(shard).name != shard):
        return f"{index.name} names {elsewhere[0]!r}, which is not in its folder; {AGAIN}"
    lacking = sorted(shard for shard in shards if not (index.parent / shard).is_file())
    if lacking:
        return f"{index.name} names {lacking[0]}, one of {len(lacking)} shards that are not there; {AGAIN}"
    return None
