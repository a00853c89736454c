"""Weights as their difference to a base's, as StableVicuna was published: no one gets the base's weights from it.

A tensor of the delta is target - base, in the target's type. Where base + delta would round to another number than the
target's (the sum is taken in float32), that number is kept beside; so what is put together again is the target, bit for
bit. Rows that the base does not have (a larger vocabulary) and tensors that it does not have are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from chatrlhf.errors import CheckpointError, ConfigError, one_line
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.tools.export.provenance import write_origin
from chatrlhf.tools.export.weights import Weights, copy_other_files, names_sha256, tensor_sha256, write_index

ABOUT, CORRECTIONS = "delta.json", "delta.corrections"


def make_delta(base: Path, target: Path, output: Path) -> dict[str, Any]:
    """Write the difference of two models' weights, with hashes of both; a file of the target at a time.

    Args:
        base, target: folders of models in their whole weights.
        output: a new folder; the target's configuration and tokenizer come with it.

    Returns:
        What the folder says about itself.

    Raises:
        ConfigError: a folder holds no weights, or the output is there already.
    """
    refuse_existing(output)
    theirs, ours = Weights(base, "--base"), Weights(target, "--target")
    hashes = theirs.hashes()
    about: dict[str, Any] = {"base": base.name, "base_sha256": names_sha256(hashes), "tensors": {}}
    about["base_tensors"] = hashes
    corrections: dict[str, Tensor] = {}

    def subtracted(name: str, value: Tensor) -> Tensor:
        about["tensors"][name] = tensor_sha256(value)
        made, at = difference(value, theirs.get(name) if name in theirs else None)
        if len(at):
            corrections[f"{name}:at"], corrections[f"{name}:value"] = at, value.flatten()[at]
        return made

    def write(folder: Path) -> None:
        copy_other_files(target, folder)
        _write_each(ours, subtracted, folder)
        if corrections:
            save_file(corrections, folder / CORRECTIONS)
        (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        write_origin(folder, target, f"as the difference to {base.name}", base_sha256=about["base_sha256"])

    publish_folder(output, write)
    return about


def apply_delta(base: Path, delta: Path, output: Path, warn: Callable[[str], None]) -> None:
    """Put a model together of its base and a delta.

    Args:
        warn: is given a line where the delta does not say which base it was made from (those of others do not).

    Raises:
        ConfigError: a folder holds no weights, or the output is there already.
        CheckpointError: the base is another one, or what comes out is not what the delta was made from.
    """
    refuse_existing(output)
    theirs, ours = Weights(base, "--base"), Weights(delta, "--delta")
    about: dict[str, Any] = {}
    hashes = dict.fromkeys(theirs, "")
    if (delta / ABOUT).exists():
        about, hashes = _about(delta), theirs.hashes()
        if not _is_base(hashes, about):
            found = names_sha256(hashes)
            raise CheckpointError(
                f"--base: {base} is not the base that this delta was made from, {about['base']!r} (SHA-256 of its "
                f"weights {found[:12]}..., expected {about['base_sha256'][:12]}...); name that one"
            )
    else:
        warn(f"{delta} does not say which base it was made from ({ABOUT} is missing), so it cannot be checked")
    corrections = _corrections(delta / CORRECTIONS)

    def added(name: str, value: Tensor) -> Tensor:
        theirs_name = _base_name(name, hashes, about.get("base_tensors"))
        made = total(value, None if theirs_name is None else theirs.get(theirs_name))
        if f"{name}:at" in corrections:
            made.view(-1)[corrections[f"{name}:at"]] = corrections[f"{name}:value"]
        if about and tensor_sha256(made) != about["tensors"].get(name):
            raise CheckpointError(f"--delta: {delta} is damaged: {name} comes out as another one; copy it again")
        return made

    def write(folder: Path) -> None:
        copy_other_files(delta, folder)
        for file in (ABOUT, CORRECTIONS):
            (folder / file).unlink(missing_ok=True)
        _write_each(ours, added, folder)
        write_origin(folder, delta, f"put together with {base.name}")

    publish_folder(output, write)


def _about(delta: Path) -> dict[str, Any]:
    """What a delta says about itself. Raises CheckpointError where that is damaged."""
    try:
        about = json.loads((delta / ABOUT).read_text(encoding="utf-8"))
        _ = about["base"], about["base_sha256"], about["tensors"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"--delta: {delta / ABOUT} cannot be read ({one_line(error)}); copy it again") from None
    return about


def _corrections(path: Path) -> dict[str, Tensor]:
    """Numbers that the sum rounds away. Raises CheckpointError where they are damaged."""
    try:
        return load_file(path) if path.exists() else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--delta: {path} cannot be read ({one_line(error)}); copy it again") from None


def _is_base(hashes: dict[str, str], about: dict[str, Any]) -> bool:
    """Whether these are the tensors that a delta was made from, under whatever names.

    A tied head is a second name of the embeddings in PyTorch's files, and left out in safetensors.
    """
    if names_sha256(hashes) == about["base_sha256"]:
        return True
    return "base_tensors" in about and set(about["base_tensors"].values()) == set(hashes.values())


def _base_name(name: str, hashes: dict[str, str], known: dict[str, str] | None) -> str | None:
    """Under which name the base here holds what the delta's base called ``name``; None where that had no such tensor.

    Args:
        hashes: of the base here, by name.
        known: of the delta's base; None: the delta does not say.
    """
    if known is None or name not in known:
        return name if known is None and name in hashes else None
    return name if name in hashes else next((n for n, found in hashes.items() if found == known[name]), None)


def difference(value: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """value - base where both have rows, value elsewhere; and the places, [n] int64 in the flattened tensor, at which
    `total` of it would not give the value.
    """
    rows = _common_rows(value, base)
    made = value.clone()
    if base is not None and rows:
        made[:rows] = (value[:rows].float() - base[:rows].float()).to(value.dtype)
    again = total(made, base)
    return made, (_bits(again) != _bits(value)).flatten().nonzero().flatten()


def total(delta: Tensor, base: Tensor | None) -> Tensor:
    """base + delta, of float32 numbers, in the type of the delta."""
    rows = _common_rows(delta, base)
    made = delta.clone()
    if base is not None and rows:
        made[:rows] = (base[:rows].float() + delta[:rows].float()).to(delta.dtype)
    return made


def refuse_existing(output: Path) -> None:
    """Raises ConfigError where there is something already."""
    if output.exists():
        raise ConfigError(f"--output: {output} is there already; name a new folder")


def _write_each(weights: Weights, made_of: Callable[[str, Tensor], Tensor], folder: Path) -> None:
    """Each file of the weights with other values, and their index."""
    names_of = {}
    for path, names in weights.files.items():
        read = weights.reader(path)
        file = f"{path.stem}.safetensors"
        save_file({name: made_of(name, read(name)).contiguous() for name in names}, folder / file, {"format": "pt"})
        names_of[file] = names
    write_index(folder, names_of)


def _common_rows(value: Tensor, base: Tensor | None) -> int:
    """How many rows, from the first, both have; none where they are not of one kind."""
    if base is None or value.dim() == 0 or value.dim() != base.dim() or value.shape[1:] != base.shape[1:]:
        return 0
    return min(len(value), len(base)) if value.is_floating_point() and base.is_floating_point() else 0


def _bits(tensor: Tensor) -> Tensor:
    """Values as integers of their size: a NaN equals itself, and 0 is not -0."""
    return tensor.contiguous().view(
        {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(tensor.element_size(), torch.int8)
    )
