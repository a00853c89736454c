"""Optimizer hyperparameters: what of an optimizer's and a schedule's state is configuration, not history."""

from __future__ import annotations

from typing import Any

from chatrlhf.compat import set_last_lr


class Hyperparameters:
    """Learning rate, betas, weight decay, eps and base learning rates as this run's configuration has them.

    `load_state_dict` of optimizers and schedulers restores them from the checkpoint as well. They are noted before it
    and put back after it, so that of a checkpoint only moments and step counts remain.
    """

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        """
        Args:
            optimizer: of torch, or what accelerate or DeepSpeed wrap around one.
            scheduler: one of `transformers.get_scheduler`, or DeepSpeed's own.
        """
        self.optimizer, self.scheduler = optimizer, getattr(scheduler, "scheduler", scheduler)
        self.groups = [
            {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
        ]
        self.base_lrs = list(getattr(self.scheduler, "base_lrs", ()))

    def put_back(self) -> None:
        """Undo what `load_state_dict` did to them; the learning rate is the schedule's at the step it has reached."""
        for group, own, lr in zip(self.optimizer.param_groups, self.groups, self._lrs(), strict=True):
            group.update(own | {"lr": lr})

    def _lrs(self) -> list[float]:
        scheduler = self.scheduler
        if not hasattr(scheduler, "lr_lambdas"):  # DeepSpeed's own, whose state is the step alone
            return scheduler.get_lr()
        scheduler.base_lrs = self.base_lrs
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        rates = [base * factor for base, factor in zip(self.base_lrs, factors, strict=True)]
        return set_last_lr(scheduler, rates)
