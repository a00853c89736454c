"""DeepSpeed engine of a part of an actor-critic: ZeRO-1, 2 or 3 (Rajbhandari et al. 2020), with or without offload."""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.collectives import rank, world_size
from chatrlhf.sharding.deepspeed_config import AUTO, EPS
from chatrlhf.sharding.engine import Outputs, Root

TAG = "state"


class ZeroEngine:
    """DeepSpeed's engine behind this package's interface; see `Engine`."""

    def __init__(
        self,
        modules: list[nn.Module],
        groups: list[dict[str, Any]],
        settings: dict[str, Any],
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        """
        Args:
            groups: the optimizer's, of weights in ``modules``, each with its learning rate.
            settings: DeepSpeed's JSON with the YAML's values in it.
        """
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        root = Root(modules)
        as_loaded = {name: each.data for name, each in root.named_parameters() if each.requires_grad}
        settings = _for_one_part(settings, root)
        optimizer = None
        if "optimizer" not in settings:
            optimizer = _optimizer(groups, settings, betas, weight_decay)
            settings["zero_allow_untested_optimizer"] = True
        self.model, wrapped, _, _ = deepspeed.initialize(
            model=root,
            model_parameters=None if optimizer is not None else groups,
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
        if self.model.bfloat16_enabled() or self.model.fp16_enabled():
            _unrounded(root, as_loaded)
        self.optimizer = optimizer if optimizer is not None else getattr(wrapped, "optimizer", wrapped)

    def __call__(self, work: Callable[[], Outputs]) -> Outputs:
        return self.model(work)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        # DeepSpeed takes the mean over ranks.
        self.model.backward(loss * world_size(), scale_wrt_gas=False)

    def clip(self) -> None:
        """DeepSpeed clips in its step."""

    def step(self) -> float:
        self.model.step()
        return float(self.model.get_global_grad_norm() or 0.0)

    def skip(self) -> None:
        raise NotImplementedError("DeepSpeed's gradients are known only behind its step")

    def save(self, folder: Path) -> None:
        self.model.save_checkpoint(str(folder), tag=TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        path, _ = self.model.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if path is None:
            raise CheckpointError(f"{folder}: DeepSpeed's states are missing; resume from another checkpoint")

    def close(self) -> None:
        self.model.destroy()


def classes_in_states() -> list[type]:
    """Classes of the objects beside tensors in DeepSpeed's checkpoints; none where it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        return []
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _unrounded(root: Root, as_loaded: dict[str, Tensor]) -> None:
    """Give the optimizer the float32 weights that were loaded: DeepSpeed takes them from the working copy."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    for name, each in root.named_parameters():
        if name not in as_loaded:
            continue
        value = as_loaded[name].to(each.device, torch.float32)
        if hasattr(each, "ds_id"):  # ZeRO-3 has a part of each; its "full" cannot where the last one is shorter
            size = each.ds_tensor.ds_numel
            padded = nn.functional.pad(value.flatten(), (0, size * world_size() - value.numel()))
            safe_set_local_fp32_param(each, padded[rank() * size :][:size])
        else:
            safe_set_full_fp32_param(each, value)


def _for_one_part(settings: dict[str, Any], root: Root) -> dict[str, Any]:
    """The JSON of a whole stage as that of an engine, nothing left to be filled in."""
    settings = copy.deepcopy(settings)
    # How many backwards a step has changes from step to step and is said with each. DeepSpeed only has to know that
    # there may be several.
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2}
    settings |= {"train_batch_size": 2 * world_size(), "steps_per_print": None}
    zero = settings["zero_optimization"]
    width = int(root.config.get_text_config().hidden_size)
    # What transformers' Trainer makes of these.
    sizes = {
        "reduce_bucket_size": width * width,
        "stage3_prefetch_bucket_size": int(0.9 * width * width),
        "stage3_param_persistence_threshold": 10 * width,
    }
    for key, size in sizes.items():
        if zero.get(key) == AUTO:
            zero[key] = size
    return settings


def _optimizer(
    groups: list[dict[str, Any]], settings: dict[str, Any], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW where the optimizer's states lie: DeepSpeed has one of its own for states in the CPU's memory."""
    kwargs = {"betas": betas, "eps": EPS, "weight_decay": weight_decay}
    offload = (settings["zero_optimization"].get("offload_optimizer") or {}).get("device", "none")
    if offload != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **kwargs)
    return torch.optim.AdamW(groups, **kwargs)
