"""Loading weights by transformers, and what its report (missing, unexpected, mismatched tensors) has to say.

transformers draws at random what a file lacks, and only logs it. Here nothing is loaded so: a tensor that is missing or
of another shape is an error that names it, and one that the model has no use for is at least said.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatrlhf.compat import loaded_adapters
from chatrlhf.errors import ConfigError, MissingError, UserError, WeightsError, one_line
from chatrlhf.models.loading.error_texts import lost, misfit, not_finite, not_floating, surplus
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.meta_llama import how_to_convert
from chatrlhf.models.loading.quantization import how_quantized
from chatrlhf.models.loading.weight_files import (
    ADAPTER_FILES,
    MODEL_FILES,
    archive_fault,
    folder_damage,
    headers,
    local_folder,
    weight_files,
)
from chatrlhf.runtime.collectives import is_main

# What an encoder without a head may lack: `last_hidden_state`, which is all that is read of it, does not use it.
UNUSED_BY_BACKBONES = ("pooler.",)
# Buffers that older versions saved and newer ones compute.
COMPUTED = re.compile(
    r"(^|\.)((attn|attention|self_attn)\.(masked_)?bias|masked_bias|position_ids|token_type_ids|(\w+\.)?inv_freq"
    r"|(cos|sin)_cached|embed_positions(\.weights)?|num_batches_tracked|_extra_state)$"
)
# Heads of language models, by the names that transformers gives them; a model without a head leaves them out.
LANGUAGE_HEADS = re.compile(
    r"^(lm_head|embed_out|final_logits_bias|cls|lm_predictions|mask_predictions|predictions|generator_predictions"
    r"|generator_lm_head|discriminator_predictions|vocab_(transform|layer_norm|projector)|head|decoder|lm_loss)(\.|$)"
)

# Where `fresh_weights` collects names.
FRESH: ContextVar[list[str] | None] = ContextVar("fresh", default=None)


@contextmanager
def fresh_weights() -> Iterator[list[str]]:
    """Inside, each tensor that a file lacks and that is drawn instead is added to the list, as "key: name"."""
    names: list[str] = []
    token = FRESH.set(names)
    try:
        yield names
    finally:
        FRESH.reset(token)


def load_pretrained(auto: Any, name: str, key: str, fresh: tuple[str, ...] = (), **kwargs: Any) -> nn.Module:
    """A model by ``auto.from_pretrained``, every tensor of which is the file's; see `load_reported`."""
    return load_reported(auto, name, key, fresh, **kwargs)[0]


def load_reported(
    auto: Any, name: str, key: str, fresh: tuple[str, ...] = (), **kwargs: Any
) -> tuple[nn.Module, set[str]]:
    """A model by ``auto.from_pretrained``, and the names of its tensors that were not in the file and might be so.

    Args:
        auto: one of transformers' Auto classes.
        name: folder or hub id.
        key: of the configuration, or the option, that names the model; for messages.
        fresh: how the names of tensors begin that may be missing.
        kwargs: of `from_pretrained`.

    Raises:
        MissingError: there is no such folder or hub id.
        ConfigError: it cannot be loaded; the reason is given.
        WeightsError: a file is damaged, or tensors are missing, of another shape or type, or not finite.
    """
    folder = local_folder(name, kwargs.get("revision"))
    if wrong := next(filter(None, map(archive_fault, weight_files(folder) if folder else [])), None):
        raise WeightsError(f"{key}: {name!r} cannot be loaded: {wrong}")
    with explained(key, name, kwargs.get("revision")), _conversion_errors(key, name):
        # Mismatches are reported with the rest, instead of raised with a reference to a log.
        kwargs = {"trust_remote_code": False} | kwargs  # None would ask on the terminal
        model, report = auto.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    if loaded_adapters(model):
        raise ConfigError(f"{key}: {name!r} holds adapters on the hub; download them into a folder and name that")
    absent = _check_report(model, report, key, name, fresh)
    if (noted := FRESH.get()) is not None:
        noted += [f"{key}: {tensor}" for tensor in sorted(absent)]
    _check_values(model, key, name, kwargs.get("revision"))
    return model, absent


def refuse_damaged(name: str, key: str) -> None:
    """Look at the weight files of a folder, or of a hub id's snapshot in the cache; their values are not read.

    Raises:
        WeightsError: one is damaged.
    """
    folder, base = local_folder(name), base_of(name)
    patterns = MODEL_FILES if base is None else ADAPTER_FILES
    if folder is not None and (wrong := folder_damage(folder, patterns)) is not None:
        raise WeightsError(f"{key}: {name!r} cannot be loaded: {wrong}")
    if base is not None:
        refuse_damaged(base, f"{key}: the base of the adapters in {name}")


@contextmanager
def explained(key: str, name: str, revision: str | None = None) -> Iterator[None]:
    """Inside, whatever transformers raises on a model's files becomes an error that names key and folder.

    Raises:
        MissingError, ConfigError, WeightsError: see `load_pretrained`.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file or configuration brings about whatever it happens to meet
        raise _explanation(key, name, revision, error) from error


def _explanation(key: str, name: str, revision: str | None, error: Exception) -> UserError:
    if (command := how_to_convert(name)) is not None:
        return ConfigError(f"{key}: {name!r} holds Meta's original LLaMA files; convert them first: {command}")
    folder = local_folder(name, revision)
    if folder is not None and (wrong := folder_damage(folder)) is not None:
        return WeightsError(f"{key}: {name!r} cannot be loaded: {wrong}")
    kind = "a folder without a usable model" if Path(name).is_dir() else "no folder here and not on the hub"
    missing = isinstance(error, OSError) and not Path(name).exists()
    refusal = MissingError if missing else ConfigError
    return refusal(f"{key}: {name!r} cannot be loaded, it is {kind} ({one_line(error)})")


def _check_report(model: nn.Module, report: dict[str, Any], key: str, name: str, fresh: tuple[str, ...]) -> set[str]:
    """Compare what was loaded with what had to be; returns what is fresh and may be. Raises WeightsError."""
    kind, total = type(model).__name__, len(model.state_dict())
    missing = {tensor for tensor in report["missing_keys"] if not tensor.startswith(fresh)}
    unexpected = {tensor for tensor in report["unexpected_keys"] if not _is_harmless(model, tensor)}
    if missing:
        raise WeightsError(f"{key}: {name!r} {lost(missing, unexpected, total, kind)}")
    others = {(tensor, tuple(saved), tuple(wanted)) for tensor, saved, wanted in report["mismatched_keys"]}
    shapes = {other for other in others if not other[0].startswith(fresh)}
    if shapes := shapes | _quantized_mismatches(model):
        raise WeightsError(f"{key}: {name!r} {misfit(shapes)}")
    if inside := {tensor for tensor in unexpected if _is_inside(model, tensor)}:
        raise WeightsError(f"{key}: {name!r} {surplus(inside, kind)}")
    if unexpected:
        say_once(f"warning: {key}: {name!r} {surplus(unexpected, kind, is_beside=True)}")
    absent = (*report["missing_keys"], *(tensor for tensor, _, _ in others))
    return {tensor for tensor in absent if tensor.startswith(fresh)}


def _check_values(model: nn.Module, key: str, name: str, revision: str | None) -> None:
    """Refuse weights that are not finite, or were integers in the file. Raises WeightsError."""
    # A sum is not finite where a term is not, and takes no memory. Weights are far from where float32 overflows.
    floating = [(n, p) for n, p in model.named_parameters() if p.is_floating_point() and not p.is_meta]
    wrong = {n for n, p in floating if not torch.isfinite(p.detach().sum(dtype=torch.float32))}
    if wrong:
        raise WeightsError(f"{key}: {name!r} {not_finite(wrong)}")
    folder = local_folder(name, revision)
    if folder is None or getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        return
    held = {n: header for path in weight_files(folder) for n, header in headers(path).items()}
    if integers := {n for n, header in held.items() if n.endswith("weight") and not header.is_floating}:
        raise WeightsError(f"{key}: {name!r} {not_floating(integers)}")


@cache
def say_once(line: str) -> None:
    """A line for the reader on stderr; of several ranks one says it."""
    if is_main():
        logging.getLogger("chatrlhf").warning(line)


def _is_harmless(model: nn.Module, name: str) -> bool:
    """Whether a name in the file is a buffer that is computed, or a language model's head beside a model without."""
    if COMPUTED.search(name) is not None:
        return True
    has_head = model.get_output_embeddings() is not None
    return not has_head and not _is_inside(model, name) and LANGUAGE_HEADS.match(name) is not None


def _is_inside(model: nn.Module, name: str) -> bool:
    """Whether a name in the file belongs to a module that the model has: then it would compute without that tensor.

    A tower beside the language model, or a head of another task, belongs to none.
    """
    roots = (model, model.base_model)
    paths = (name, name.removeprefix(f"{model.base_model_prefix}."))
    return any(_deepest(root, path) not in roots for root in roots for path in paths)


def _deepest(module: nn.Module, path: str) -> nn.Module:
    """The module that a path leads to, as far as it leads."""
    first, _, rest = path.partition(".")
    child = dict(module.named_children()).get(first)
    return module if child is None else _deepest(child, rest)


def _quantized_mismatches(model: nn.Module) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Tensors of another shape than the configuration says, where bitsandbytes holds them: transformers takes any."""
    if how_quantized(model) is None:
        return set()
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        # A T5's head may be its embeddings by the configuration, and be held apart from them.
        planned = type(model)(config).named_parameters(remove_duplicate=False)
    wanted = {name: tuple(weight.shape) for name, weight in planned}
    held = {n: tuple(getattr(getattr(p, "quant_state", None), "shape", p.shape)) for n, p in model.named_parameters()}
    # GPT-2's matrices are quantized transposed.
    return {(n, shape, wanted[n]) for n, shape in held.items() if wanted[n] not in (shape, shape[::-1])}


@contextmanager
def _conversion_errors(key: str, name: str) -> Iterator[None]:
    """Inside, an error of transformers that refers to its log names the tensors that the log names.

    Where several tensors of a file make one of the model (the experts of a mixture), and one of them is missing.
    """
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        heard.append(record.getMessage())
        return False

    log = logging.getLogger("transformers.modeling_utils")
    level = log.level
    log.setLevel(logging.INFO)
    log.addFilter(hear)
    try:
        yield
    except RuntimeError as error:
        tensors = {n for text in heard for n in re.findall(r"^(\S+) *\| *\S*CONVERSION", text, re.MULTILINE)}
        if not tensors:
            raise
        raise WeightsError(
            f"{key}: {name!r} cannot be loaded: the tensors that make up {', '.join(sorted(tensors))} are incomplete "
            "or of several shapes; copy or download the model again"
        ) from error
    finally:
        log.removeFilter(hear)
        log.setLevel(level)
