"""TRL's trainers over several ranks: each batch of one process, split over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler

from chatrlhf.config.schema import ActorConfig
from chatrlhf.data.epochs import Epochs
from chatrlhf.errors import ConfigError
from chatrlhf.sharding.launch import microbatching
from chatrlhf.stages import global_batches
from chatrlhf.stages.global_batches import RankBatches, _Collator
from chatrlhf.stages.row_order import EpochOrder

LENGTHS = np.arange(29) * 7 % 29 + 1


def batches_of(monkeypatch, order: EpochOrder, ranks: int, micro: int, epoch: int) -> list[list[list[int]]]:
    """Each rank's microbatches of an epoch."""
    monkeypatch.setattr(global_batches, "world_size", lambda: ranks)
    found = []
    for number in range(ranks):
        monkeypatch.setattr(global_batches, "rank", lambda number=number: number)
        sampler = RankBatches(order, micro)
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(sampler) == len(found[-1])
    return found


@pytest.mark.parametrize("rows", [24, 29, 25])
@pytest.mark.parametrize("ranks, micro", [(1, 12), (2, 6), (2, 2), (3, 4), (3, 3), (4, 1)])
@pytest.mark.parametrize("sort_by_length", [False, True])
def test_the_batches_are_those_of_one_process(monkeypatch, rows, ranks, micro, sort_by_length):
    order = EpochOrder(Epochs.of_all(rows), 12, 3, LENGTHS[:rows] if sort_by_length else None)
    for epoch in (0, 1):
        order.set_epoch(epoch)
        whole = list(BatchSampler(order, 12, drop_last=False))
        shares = batches_of(monkeypatch, order, ranks, micro, epoch)
        assert len({len(share) for share in shares}) == 1  # or a rank would wait for ever
        backwards = -(-12 // ranks // micro)
        for number, batch in enumerate(whole):
            parts = [
                row for share in shares for part in share[number * backwards : (number + 1) * backwards] for row in part
            ]
            assert sorted(parts) == sorted(batch)


def test_a_microbatch_without_rows_has_no_weight():
    def collate(rows):
        return {"input_ids": torch.tensor(rows), "labels": torch.tensor(rows)}

    assert _Collator(collate, [7, 8])([[1, 2]])["labels"].tolist() == [[1, 2]]
    assert _Collator(collate, [7, 8])([])["labels"].tolist() == [[-100, -100]]
    assert _Collator(lambda rows: {"input_ids": rows}, 7)([]) == {"input_ids": [7], "rows": 0}
    assert _Collator(lambda rows: {"input_ids": rows}, 7)([1, 2]) == {"input_ids": [1, 2], "rows": 2}


def test_a_batch_that_ranks_do_not_divide_is_refused_by_its_key(monkeypatch):
    monkeypatch.setattr("chatrlhf.sharding.launch.world_size", lambda: 3)
    assert microbatching(ActorConfig(batch_size=12, micro_batch_size=2), "actor_config") == (2, 2)
    assert microbatching(ActorConfig(batch_size=12), "actor_config") == (4, 1)
    with pytest.raises(ConfigError, match=r"actor_config.batch_size: 8 .* the 3 processes.* set it to 6 or 9"):
        microbatching(ActorConfig(batch_size=8), "actor_config")
    with pytest.raises(ConfigError, match="set it to 3"):
        microbatching(ActorConfig(batch_size=2), "actor_config")
    with pytest.raises(ConfigError, match=r"actor_config.micro_batch_size: 3 does not divide the 4 rows"):
        microbatching(ActorConfig(batch_size=12, micro_batch_size=3), "actor_config")
