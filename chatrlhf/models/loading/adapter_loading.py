"""Loading adapters of a peft folder: everything that the folder holds is restored, or refused by its name.

peft and transformers load what has a name they know, and only log the rest, if that. After each load here peft's own
result is asked for once more: no tensor of the adapters is missing, none of the file is left over. With that, what was
loaded is what is in the file, exactly, and no second copy of the model is needed to compare with.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatrlhf.errors import UserError, WeightsError, one_line
from chatrlhf.models.loading.error_texts import count_of, listed, not_finite
from chatrlhf.models.loading.lora import ADAPTER_CONFIG, TRAINED, bare_name, is_adapter
from chatrlhf.models.loading.vocabulary_rows import PREFIX, give_rows
from chatrlhf.models.loading.weight_files import ADAPTER_FILES, Header, folder_damage, headers, weight_files

# Settings of peft's LoRA under which adapters are factors in linear layers and nothing else. Whatever else is set
# changes the base, or what the layers compute, in a way that the trainers here do not know.
FACTORS_ALONE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "target_parameters", "megatron_core",
    "loftq_config", "runtime_config", "eva_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Of `init_lora_weights`: the others move a part of the base's weights into the adapters when they are added.
LEAVES_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")
TOKEN_ROWS = ".trainable_tokens_delta"
MISMATCH = re.compile(r"size mismatch for (\S+): copying a param with shape torch.Size\((.*?)\).*?torch.Size\((.*?)\)")


def wrapped(model: nn.Module, folder: str | Path, is_trainable: bool = False) -> nn.Module:
    """A model wrapped by peft, with the adapters of a folder; it gets rows for tokens that were added with them.

    Raises:
        WeightsError: the folder is damaged, or holds something that cannot be restored on this model.
    """
    from peft import PeftModel

    settings, held = read_adapters(folder)
    with explained_adapters(folder):
        give_rows(model, settings, held)
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    _check_restored(adapted, folder)
    return adapted


def attach(model: nn.Module, folder: str | Path) -> None:
    """Put the adapters of a folder inside a model, where they stay apart from its weights.

    Raises:
        WeightsError: as `wrapped`, or they hold more than low-rank factors.
    """
    settings, held = read_adapters(folder)
    more = more_than_factors(settings)
    if not more and (changed := _changed_weights(model, folder, held)):
        more = f"whole tensors that differ from their base's ({listed(changed)})"
    if more:
        raise WeightsError(
            f"{folder}: these adapters hold {more}, which cannot stay apart from the base's weights here; merge them "
            f"first (chatrlhf export merge --model {folder}), or set peft_enable to False"
        )
    with explained_adapters(folder):
        # Of shapes that do not fit `_check_restored` says more.
        model.load_adapter(str(folder), adapter_name=TRAINED, ignore_mismatched_sizes=True)
    _check_restored(model, folder)


def continue_adapters(model: nn.Module, folder: Path) -> None:
    """Give a model the adapters of a folder, to be trained on. Raises WeightsError as `attach`."""
    attach(model, folder)
    for name, weight in model.named_parameters():
        weight.requires_grad_(is_adapter(name))


def train_on_adapters(base: nn.Module, folder: str) -> nn.Module:
    """A model wrapped by peft with the adapters of a folder, to be trained on by a stage on TRL's trainers.

    Raises:
        WeightsError: as `wrapped`.
    """
    return wrapped(base, folder, is_trainable=True)


def read_adapters(folder: str | Path) -> tuple[Any, dict[str, Header]]:
    """The settings of adapters, and the tensors in their file.

    Raises:
        WeightsError: there are none, they are damaged, or they are prompts instead of weights.
    """
    from peft import PeftConfig

    files = weight_files(Path(folder), ADAPTER_FILES)
    if not files:
        raise WeightsError(f"{folder} holds {ADAPTER_CONFIG} and neither of {', '.join(ADAPTER_FILES)}; copy it again")
    if (wrong := folder_damage(Path(folder), ADAPTER_FILES)) is not None:
        raise WeightsError(f"{folder}: the adapters cannot be loaded: {wrong}")
    with explained_adapters(folder):
        settings = PeftConfig.from_pretrained(str(folder))
    if settings.is_prompt_learning or settings.is_adaption_prompt:
        raise WeightsError(
            f"{folder}: {settings.peft_type.value} adapters are prompts in front of the text, which cannot be merged "
            "into a model's weights; train low-rank adapters (LORA) instead"
        )
    if getattr(settings, "layer_replication", None):
        raise WeightsError(
            f"{folder}: these adapters stand on repeated layers (layer_replication), which is not supported; save "
            "their base with the layers repeated, and train adapters on that"
        )
    return settings, headers(files[0])


def more_than_factors(settings: Any) -> str:
    """What adapters of these settings hold besides low-rank factors, in words; empty where there is nothing else."""
    from peft import LoraConfig, PeftType

    if settings.peft_type != PeftType.LORA:
        return f"peft_type {settings.peft_type.value}"
    usual = vars(LoraConfig())
    beyond = {n: v for n, v in vars(settings).items() if n not in FACTORS_ALONE and v and v != usual.get(n)}
    if settings.init_lora_weights in LEAVES_THE_BASE:
        beyond.pop("init_lora_weights", None)
    return ", ".join(f"{name} ({value})" for name, value in beyond.items())


def _changed_weights(model: nn.Module, folder: str | Path, held: Collection[str]) -> list[str]:
    """Names of whole tensors beside the factors that are not what the base has.

    peft saves embeddings and heads along with factors of theirs, changed or not.
    """
    from peft import load_peft_weights

    full = [name for name in held if not is_adapter(name)]
    if not full:
        return []
    own, weights = dict(model.named_parameters(remove_duplicate=False)), load_peft_weights(str(folder), device="cpu")
    return [name for name in full if not _is_same(own.get(bare_name(name.removeprefix(PREFIX))), weights[name])]


def _is_same(own: torch.Tensor | None, saved: torch.Tensor) -> bool:
    return own is not None and own.shape == saved.shape and torch.equal(own.detach().cpu(), saved.to(own.dtype))


def _check_restored(model: nn.Module, folder: str | Path) -> None:
    """Ask peft once more what of a folder's adapters it finds in the model, and the other way. Raises WeightsError."""
    from peft import load_peft_weights, set_peft_model_state_dict

    with explained_adapters(folder):
        weights = load_peft_weights(str(folder), device="cpu")
        result = set_peft_model_state_dict(model, weights, TRAINED)
    if left_over := [name for name in result.unexpected_keys if not _is_saved_twice(name, weights)]:
        heads = any(name.rpartition(".")[0].endswith(("score", "classifier")) for name in left_over)
        whose = "a classifier's head, as adapters of a reward model have" if heads else "names of another model"
        raise WeightsError(
            f"{folder}: {count_of(left_over)} of the adapters match nothing in their base ({listed(left_over)}): "
            f"{whose}; name the adapters' own base in {ADAPTER_CONFIG}, or other adapters"
        )
    if missing := _not_restored(model, result.missing_keys):
        raise WeightsError(
            f"{folder}: the file lacks {count_of(missing)} that {ADAPTER_CONFIG} speaks of ({listed(missing)}), which "
            "would be as if untrained; copy the adapters again, or save them merged with the peft that trained them"
        )
    floating = {name: weight for name, weight in weights.items() if weight.is_floating_point()}
    if wrong := [name for name, weight in floating.items() if not torch.isfinite(weight.sum(dtype=torch.float32))]:
        raise WeightsError(f"{folder}: the file of these adapters {not_finite(wrong)}")


def _is_saved_twice(name: str, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tensor is in the file under another name, too: peft saves embeddings again where they were resized.

    Rows of trained tokens are saved again for the head that is tied to the embeddings.
    """
    twin = name.replace(".modules_to_save.", ".")
    if twin != name:
        return twin in weights and torch.equal(weights[twin], weights[name])
    return any(
        other != name and other.endswith(TOKEN_ROWS) and torch.equal(weights[other], weights[name])
        for other in (weights if name.endswith(TOKEN_ROWS) else ())
    )


def _not_restored(model: nn.Module, missing: Collection[str]) -> list[str]:
    """Tensors of adapters that were not in the file, under any of their names."""
    state = model.state_dict(keep_vars=True)
    restored = {id(tensor) for name, tensor in state.items() if name not in set(missing)}
    return [name for name in missing if TRAINED in name.split(".") and id(state[name]) not in restored]


@contextmanager
def explained_adapters(folder: str | Path, verb: str = "loaded on their base") -> Iterator[None]:
    """Inside, whatever peft raises on a folder becomes one line that names it.

    Args:
        verb: what cannot be done with the adapters.

    Raises:
        WeightsError: in place of any exception but our own, and those of memory.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # peft checks little; a foreign file brings about whatever it happens to meet
        reason, remedy = one_line(error), "name adapters that belong to their base, or copy them again"
        if sizes := MISMATCH.findall(str(error)):
            (name, saved, wanted), *rest = sizes
            more = f", and {len(rest)} more" if rest else ""
            reason = f"{name} is {saved} in the file and {wanted} on the base{more}"
            remedy = f"name the adapters' own base in {ADAPTER_CONFIG}"
        raise WeightsError(f"{folder}: these adapters cannot be {verb} ({reason}); {remedy}") from error
