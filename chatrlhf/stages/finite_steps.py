"""Mixin for transformers' Trainer: an optimizer step whose loss or gradient is not finite is not taken.

Neither weights nor moments nor the schedule move; the batch is kept in a file, and several such steps in a row end the
stage (`SkippedSteps`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.compat import mark_step
from chatrlhf.data.row_sampler import RowOrder, Seen
from chatrlhf.errors import DivergedError
from chatrlhf.runtime.collectives import all_reduce_max, world_size
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.finite import first_module_not_finite, first_not_finite
from chatrlhf.runtime.skipped_steps import SkippedSteps
from chatrlhf.runtime.watchdog import beat


class FiniteSteps:
    """Stands before a Trainer whose `order` is a `RowOrder`."""

    order: RowOrder
    place = Seen()  # of the step's first row
    skipped: SkippedSteps
    step_was_skipped = False

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """A microbatch's loss, 0 where it is not finite: the Trainer's own mean would stay a NaN for ever."""
        beat(f"{self.skipped.stage}: a microbatch of step {self.state.global_step + 1}")
        self._microbatches.append(dict(inputs))  # what computes the loss may take some out
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._losses.append(loss)
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The microbatches of the next optimizer step."""
        self._losses: list[Tensor] = []
        self._microbatches: list[dict[str, Any]] = []
        self.place = self.order.seen
        return super().get_batch_samples(*args)

    def check_step(self, model: nn.Module, optimizer: Any, step: int) -> None:
        """Before the optimizer steps: leave the step out where it would not be finite.

        Args:
            step: its number, from 1.

        Raises:
            DivergedError: too many in a row; or the first, where DeepSpeed has stepped already.
        """
        reached("trainer.gradients", model)
        loss = float(torch.stack(self._losses).sum())
        engine_steps = hasattr(self.accelerator, "deepspeed_engine_wrapped") and self.is_deepspeed_enabled
        scaler = self.accelerator.scaler  # of fp16: it leaves out steps whose gradients overflow, and scales less
        norm = 0.0 if engine_steps or scaler is not None else gradient_norm(model)
        wrong = [f"{name} {value}" for name, value in (("loss", loss), ("gradient", norm)) if not math.isfinite(value)]
        self.step_was_skipped = bool(all_reduce_max(bool(wrong)))
        if scaler is None:
            mark_step(optimizer, self.step_was_skipped)
        if not self.step_was_skipped:
            self.skipped.taken()
            return
        why = ", ".join(wrong) or "another process's loss or gradient is not finite"
        if engine_steps:
            raise DivergedError(f"{self.skipped.stage} step {step}: {why}; nothing is saved. {self.skipped.remedy}")
        where = self._where(model)
        if scaler is None:
            for weight in model.parameters():
                weight.grad = None
        self.skipped.skip(step, why, where, self._rows())

    def _where(self, model: nn.Module) -> str | None:
        """The weight, module or gradient that is the first not to be finite."""
        if (weight := first_not_finite(model.named_parameters())) is not None:
            return weight
        if world_size() > 1:  # a forward may need all ranks
            return None

        def forward() -> None:
            for inputs in self._microbatches:
                on_device = {
                    name: each.to(self.args.device) if isinstance(each, Tensor) else each
                    for name, each in inputs.items()
                }
                self.compute_loss(model, on_device)

        gradients = ((name, each.grad) for name, each in model.named_parameters() if each.grad is not None)
        return first_module_not_finite(model, forward) or first_not_finite(
            (f"the gradient of {name}", grad) for name, grad in gradients
        )

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the step's batch, with the number of each among those that are trained on."""
        numbers = self.order.of(self.place.epochs)[self.place.rows :][: self.order.batch_size]
        rows = []
        for number in numbers:
            row = {name: _plain(value) for name, value in self.train_dataset[number].items()}
            ids = row.get("input_ids", row.get("chosen_ids"))
            rows.append({"row": number + 1, "text": self.processing_class.decode(ids), **row})
        return rows


def gradient_norm(model: nn.Module) -> float:
    """Of all that is trained, of all ranks' parts."""
    norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value
