"""Mixin for transformers' Trainer: a resumed run trains by this run's settings, from the row at which it stopped.

Left to itself the Trainer takes learning rate, betas, weight decay and the intervals of evaluation and checkpoints from
the checkpoint, and works its place in the data out of the number of steps, as if the batch size had never changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatrlhf.data.row_sampler import RowOrder
from chatrlhf.runtime.optimizer import Hyperparameters
from chatrlhf.stages.finite_steps import FiniteSteps

ORDER = "order.json"  # in a checkpoint: what was seen of the rows


class ResumableTrainer(FiniteSteps):
    """Stands before a Trainer whose `order` is a `RowOrder`."""

    order: RowOrder
    steps_done = 0  # optimizer steps before the run was resumed

    def resume_rows(self, checkpoint: Path, steps: int) -> None:
        """Continue with the rows behind a checkpoint of so many optimizer steps; to be called before `train`.

        Raises:
            CheckpointError: an epoch has other rows than it had.
        """
        self.steps_done = steps
        if (state := order_state(checkpoint)) is not None:
            self.order.load_state_dict(state)
        else:
            self.order.resume_behind(steps)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run; the horizon of the schedule."""
        return self.steps_done + self.order.steps_left(int(self.args.num_train_epochs))

    def microbatches(self, rows: int) -> int:
        """Backwards that a rank makes of so many rows in succession."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The microbatches of the next optimizer step."""
        samples = super().get_batch_samples(*args)
        self.order.advance()
        return samples

    # ----- transformers' methods, in the order in which `Trainer._inner_training_loop` calls them

    def set_initial_training_values(self, *args: Any) -> tuple[Any, ...]:
        *values, _ = super().set_initial_training_values(*args)
        return *values, self.total_steps

    def _init_training_state(
        self, max_steps: int, steps_of_an_epoch: int, epochs: int, checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """Returns epochs done, and microbatches to be skipped of the next one."""
        done = super()._init_training_state(max_steps, steps_of_an_epoch, epochs, checkpoint, trial)
        if checkpoint is None:
            return done
        self.state.compute_steps(self.args, max_steps)
        if self.steps_done == max_steps:
            return epochs, 0  # nothing is left
        place = self.order.resumed_at
        return place.epochs, self.args.gradient_accumulation_steps if place.rows else 0

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if optimizer is None:  # by the loop, not by DeepSpeed's integration: the optimizer is ready
            self._own = Hyperparameters(self.optimizer, scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._own.put_back()

    def _run_epoch(self, epoch: int, steps_in_epoch: int, num_update_steps_per_epoch: int, **rest: Any) -> None:
        """Of an epoch that is resumed inside: the batch of place holders, and the batches of the rows that are left."""
        if self.order.resumes_inside(epoch):
            left = self.order.rows_left(epoch)
            steps_in_epoch = self.args.gradient_accumulation_steps + self.microbatches(left)
            num_update_steps_per_epoch = 1 + -(-left // self.order.batch_size)
        super()._run_epoch(
            epoch=epoch,
            steps_in_epoch=steps_in_epoch,
            num_update_steps_per_epoch=num_update_steps_per_epoch,
            **rest,
        )


def order_state(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint knows of the rows that were seen; None in one of an earlier version."""
    path = checkpoint / ORDER
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
