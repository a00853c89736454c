"""The words of errors about tensors: which, how many, what has happened to their names, and the remedy."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection

SHOWN = 3  # names in a message
SOUGHT = 50  # names that are looked for under another name

# What others' code puts into the names of a model that it wraps, and how such a model is saved.
WRAPPERS = {
    "_orig_mod.": "by torch.compile; save the model that was compiled (model._orig_mod)",
    "_fsdp_wrapped_module.": "by FSDP; gather and save the state dict of the model inside",
    "_checkpoint_wrapped_module.": "by activation checkpointing; save the model inside",
    "base_model.model.": "by peft; save model.merge_and_unload(), or the adapters alone (PeftModel.save_pretrained)",
    "pretrained_model.": "by TRL's value-head wrapper; save model.pretrained_model",
    "module.": "by DDP or DeepSpeed; save the model inside (model.module)",
}
NESTED = ("state_dict", "model_state_dict", "model", "module")  # under which training checkpoints keep a state dict


def listed(names: Collection[str]) -> str:
    """The first names, and how many there are beyond them."""
    first = sorted(names)[:SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest:,} more" if rest else "")


def count_of(names: Collection[object]) -> str:
    """How many tensors these are."""
    return f"{len(names):,} tensor" + ("s" if len(names) != 1 else "")


def lost(missing: Collection[str], unexpected: Collection[str], total: int, kind: str) -> str:
    """Of tensors that a file lacks.

    Args:
        unexpected: names in the file that the model does not have.
        total: tensors of the model.
        kind: its class.
    """
    lacking = f"lacks {len(missing):,} of {total:,} tensors of a {kind} ({listed(missing)}), which would be random"
    if (why := _renamed(missing, unexpected)) is not None:
        return f"{lacking}: {why}"
    if all(name.startswith(("lm_head.", "embed_out.")) for name in missing):
        beside = f"; it holds {listed(unexpected)} instead, the head of another task" if unexpected else ""
        return f"{lacking}{beside}; name a model that was saved with its language modeling head"
    held = f"; the file holds {listed(unexpected)}, which the model does not have" if unexpected else ""
    return f"{lacking}{held}; copy or download the model again, or name the one that its config.json belongs to"


def misfit(shapes: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> str:
    """Of tensors with another shape than the configuration says: name, shape in the file, shape in the model."""
    said = [f"{name} is {list(saved)} in the file and {list(wanted)} by config.json" for name, saved, wanted in shapes]
    return f"has {count_of(shapes)} of another shape ({listed(said)}); put back the config.json of these weights"


def surplus(names: Collection[str], kind: str, is_beside: bool = False) -> str:
    """Of tensors in a file that the model has no use for.

    Args:
        is_beside: they belong to no part that the model has.
    """
    held = f"holds {count_of(names)} that a {kind} does not have ({listed(names)})"
    if is_beside:
        return f"{held}; they are left out"
    return f"{held}, so it would not compute what these weights were trained for; put back their config.json"


def not_finite(names: Collection[str]) -> str:
    """Of tensors with NaN or infinite values."""
    return f"has NaN or infinite values in {count_of(names)} ({listed(names)}); name an earlier or undamaged copy"


def not_floating(names: Collection[str]) -> str:
    """Of weights that are integers in the file of a model that is not quantized by its configuration."""
    return (
        f"holds integers in {count_of(names)} ({listed(names)}) and its config.json has no quantization_config; put it "
        "back, or name the unquantized model"
    )


def _renamed(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """What has happened to the names in a file, and the remedy; None where it is not that."""
    if nested := sorted(set(unexpected) & set(NESTED)):
        return f"the file is a training checkpoint with the weights under {nested[0]!r}; save that state dict alone"
    for wrapper, by in WRAPPERS.items():
        inside = re.compile(rf"(^|\.){re.escape(wrapper)}")
        if any(inside.search(name) for name in unexpected):
            return f"names in the file carry {wrapper!r}, put there {by}, or remove it from the names"
    sought = sorted(missing)[:SOUGHT]
    prefixes = Counter(n.removesuffix(wanted) for wanted in sought for n in unexpected if n.endswith(f".{wanted}"))
    prefix, count = prefixes.most_common(1)[0] if prefixes else ("", 0)
    return f"names in the file begin with {prefix!r}; remove that from them" if count * 2 >= len(sought) else None
