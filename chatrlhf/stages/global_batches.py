"""Several processes on TRL's trainers: the optimizer steps of one process, each rank with its part of every batch.

Left to themselves these trainers give each rank a whole batch, fill up the last one of an epoch with rows seen before,
and average the ranks' mean losses, however many rows each had. Here a batch is what it is in one process, and each row
counts in it alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from chatrlhf.compat import num_items_in_batch, without_unused_columns
from chatrlhf.data.encoder import IGNORED
from chatrlhf.data.row_sampler import RowOrder
from chatrlhf.runtime.collectives import gather_objects, rank, world_size
from chatrlhf.runtime.watchdog import beat
from chatrlhf.stages.resumable_trainer import ResumableTrainer


class RankBatches:
    """This rank's rows of each batch in microbatches: a batch sampler, and all ranks yield the same number.

    Rows come in the order in which one process sees them. Of the last batch of an epoch a rank may have no row; it then
    yields an empty microbatch.
    """

    def __init__(self, order: RowOrder, micro: int) -> None:
        self.order, self.micro = order, micro

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer."""
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return self.microbatches(len(self.order))

    def microbatches(self, rows: int) -> int:
        """Those that each rank has of so many rows in succession."""
        whole, rest = divmod(rows, self.order.batch_size)
        return whole * self._microbatches(self.order.batch_size) + self._microbatches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in BatchSampler(self.order, self.order.batch_size, drop_last=False):
            own = batch[rank() :: world_size()]
            for number in range(self._microbatches(len(batch))):
                yield own[number * self.micro : (number + 1) * self.micro]

    def _microbatches(self, rows: int) -> int:
        """Those of the rank with the most rows."""
        return math.ceil(math.ceil(rows / world_size()) / self.micro)


class GlobalBatches(ResumableTrainer):
    """To stand in front of a TRL trainer, which then sees rows in this project's order."""

    def __init__(self, *args: Any, order: RowOrder, **kwargs: Any) -> None:
        self.order = order
        self.evaluated: list[tuple[float, int]] = []  # mean loss and labels of each held-out batch
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any) -> RowOrder:
        return self.order

    def microbatches(self, rows: int) -> int:
        return RankBatches(self.order, self.args.per_device_train_batch_size).microbatches(rows)

    def get_train_dataloader(self) -> DataLoader:
        if world_size() == 1:
            return super().get_train_dataloader()
        dataset = without_unused_columns(self, self.train_dataset, "training")
        batches = RankBatches(self.order, self.args.per_device_train_batch_size)
        return _Loader(dataset, batch_sampler=batches, collate_fn=_Collator(self.data_collator, dataset[0]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """All held-out rows on every rank: they are few, and so none is counted twice to fill up a batch."""
        if world_size() == 1:
            return super().get_eval_dataloader(eval_dataset)
        dataset = without_unused_columns(self, self.eval_dataset, "evaluation")
        return DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)

    def get_batch_samples(self, *args: Any) -> tuple[list[Any], Any]:
        """The microbatches of an optimizer step, each with what its mean loss counts in the batch's."""
        batches, items = super().get_batch_samples(*args)
        if any("rows" in batch for batch in batches):
            rows = [batch.pop("rows") for batch in batches]
            total = sum(gather_objects(sum(rows)))
            for batch, own in zip(batches, rows, strict=True):
                # The trainer divides by its microbatches, and DDP by the ranks.
                batch["share"] = own / total * len(batches) * world_size()
        return batches, items

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        share = inputs.pop("share", None)
        result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if share is None:
            return result
        return (share * result[0], result[1]) if return_outputs else share * result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The held-out loss as a mean over labels, as in training; the trainer averages batches by their rows."""
        self.evaluated = []
        output = super().evaluation_loop(*args, **kwargs)
        if self.evaluated:
            losses, labels = torch.tensor(self.evaluated, dtype=torch.float64).unbind(dim=1)
            output.metrics["eval_loss"] = float(losses @ labels / labels.sum())
        return output

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        beat(f"{self.skipped.stage}: held-out rows")
        labels = num_items_in_batch(self, [inputs], self.args.device)  # before the step takes them out
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        if labels is not None:
            self.evaluated.append((float(loss), int(labels)))
        return loss, *rest


class _Loader(DataLoader):
    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class _Collator:
    """A collator that can make a microbatch of no rows: of one that counts nothing, so that ranks stay in step."""

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]], spare: Any) -> None:
        self.collate, self.spare = collate, spare

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        batch = self.collate(rows or [self.spare])
        if "labels" in batch:  # the loss is divided by the labels of all ranks
            if not rows:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        else:
            batch["rows"] = len(rows)
        return batch
