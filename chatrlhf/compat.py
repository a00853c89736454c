"""Private names of other libraries: all that this package uses, in one file, each held by `tests/test_compat.py`.

A private name may change in any release. After an upgrade this file and one list of failing tests say what to mend.
Methods that libraries call on a subclass of ours cannot be wrapped; `OVERRIDDEN` names them, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# Class of another library -> its private methods that a class of ours overrides, and why there is no public way.
OVERRIDDEN = {
    "transformers.Trainer": {
        "_init_training_state": "a resumed run continues at a row, not at a batch of the old size",
        "_load_optimizer_and_scheduler": "this run's rates and schedule stay in force when it is resumed",
        "_run_epoch": "the first epoch after a resume has fewer batches than the others",
        "_get_train_sampler": "rows come in the order of `RowOrder`, which is part of a checkpoint",
    },
    "trl.RewardTrainer": {"_prepare_dataset": "rows are token ids and scores already"},
}


# ----- torch


def foreach_copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, all in one kernel where devices allow it; dtypes may differ."""
    torch._foreach_copy_(list(targets), list(sources))


def softmax_backward(grad: Tensor, output: Tensor, dim: int) -> Tensor:
    """Gradient of a softmax's input from that of its output; both of the output's shape."""
    return torch._softmax_backward_data(grad, output, dim, output.dtype)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's parameters without its children's, in the dictionary that it looks them up in."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's buffers without its children's, in the dictionary that it looks them up in."""
    return module._buffers


@contextmanager
def replaced_modules(blocks: nn.ModuleList, by: dict[str, nn.Module]) -> Iterator[None]:
    """Inside, a list holds other modules: setting them one by one would register them with the model."""
    own, blocks._modules = blocks._modules, by
    try:
        yield
    finally:
        blocks._modules = own


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors that share memory; tensors without content (`fake_tensor_mode`) have one too."""
    return tensor.untyped_storage()._cdata


def default_store() -> Any:
    """The key-value store of the default process group."""
    return torch.distributed.distributed_c10d._get_default_store()


def set_last_lr(scheduler: Any, rates: list[float]) -> list[float]:
    """Have a scheduler report these learning rates as its last ones."""
    scheduler._last_lr = rates
    return rates


def fake_tensor_mode() -> type:
    """Class of the mode in which operations compute shapes alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode


def dispatch_mode() -> type:
    """Class of a mode that sees every operation below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    return TorchDispatchMode


def tensors_in(tree: Any) -> Iterable[Any]:
    """The leaves of nested lists, tuples and dictionaries."""
    from torch.utils._pytree import tree_leaves

    return tree_leaves(tree)


def is_item_call(operation: Any) -> bool:
    """Whether an operation is what ``tensor.item()`` comes down to."""
    return operation is torch.ops.aten._local_scalar_dense.default


def cpu_flash_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, **rest: Any) -> Tensor:
    """The fused attention kernel of CPUs, whatever the device: what it keeps for its backward is what others keep."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, dropout, causal, **rest)[0]


# ----- transformers, peft


def attention_of(config: Any) -> str | None:
    """The attention implementation that a model was made with or given since."""
    return getattr(config, "_attn_implementation", None)


def kernels_of(config: Any) -> list[str]:
    """Attention and experts' implementations that a configuration asks for, those of its parts included."""
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    names = ("_attn_implementation", "_experts_implementation")
    return [kernel for part in parts for name in names if isinstance(kernel := getattr(part, name, None), str)]


def loaded_adapters(model: nn.Module) -> bool:
    """Whether transformers' own mixin has put adapters into a model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def mark_adapters(model: nn.Module) -> None:
    """Have transformers save a model's adapters as adapters."""
    model._hf_peft_config_loaded = True


def forget_adapters(model: nn.Module) -> None:
    """Have transformers take a model for one without adapters."""
    for name in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(name, None)


def modules_kept_in_fp32(model: nn.Module) -> set[str]:
    """Names of layers that a family keeps in float32 whatever the precision is."""
    return set(getattr(model, "_keep_in_fp32_modules", None) or ())


def block_names(model: nn.Module) -> set[str]:
    """Class names of the blocks that a family wants whole on one device."""
    return set(getattr(model, "_no_split_modules", None) or ())


def set_block_names(module: nn.Module, names: list[str]) -> None:
    """The same, for a module that holds several models."""
    module._no_split_modules = names


def num_items_in_batch(trainer: Any, batches: list[dict[str, Any]], device: torch.device) -> Any:
    """Labels in batches as transformers' Trainer counts them; None where the loss is no mean over labels."""
    return trainer._get_num_items_in_batch(batches, device)


def without_unused_columns(trainer: Any, dataset: Any, description: str) -> Any:
    """A dataset with the columns that the model's forward takes."""
    return trainer._remove_unused_columns(dataset, description=description)


@contextmanager
def grouped_products(function: Any) -> Iterator[None]:
    """Inside, experts' products are computed by ``function(states, weights, offsets)``."""
    from transformers.integrations import moe

    own, moe._grouped_mm = moe._grouped_mm, function
    try:
        yield
    finally:
        moe._grouped_mm = own


# ----- accelerate, DeepSpeed


def reset_accelerate() -> None:
    """Have accelerate forget the processes and models that it has met."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def mark_step(optimizer: Any, skipped: bool) -> None:
    """Have accelerate take the optimizer's next step for one that was skipped, or for one that was not.

    Then the Trainer leaves the schedule where it is.
    """
    optimizer._is_overflow = skipped


def has_fp32_master(parameter: Tensor) -> bool:
    """Whether DeepSpeed keeps a float32 master of a parameter, whole or sharded."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
