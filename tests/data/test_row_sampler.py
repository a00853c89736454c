"""Rows of an epoch, however often a run is stopped and its batch size changed: each is seen once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from chatrlhf.data.epochs import Epochs
from chatrlhf.data.token_stream import StreamOrder
from chatrlhf.errors import CheckpointError
from chatrlhf.stages.row_order import EpochOrder

LENGTHS = np.random.default_rng(0).integers(1, 50, 103)


def trained(order, steps: int, epochs: int) -> list[list[int]]:
    """The rows of each optimizer step, as a trainer takes them: at most ``steps`` of them, or to the end."""
    batches = []
    for epoch in range(order.resumed_at.epochs, epochs):
        order.set_epoch(epoch)
        rows = list(order)
        if order.resumes_inside(epoch):
            rows = rows[order.batch_size :]  # place holders
        assert len(rows) == order.rows_left(epoch)
        for start in range(0, len(rows), order.batch_size):
            if len(batches) == steps:
                return batches
            batches.append(rows[start : start + order.batch_size])
            order.advance()
    return batches


def resumed(make, plan: list[tuple[int, int]], epochs: int) -> tuple[list[list[int]], list[int]]:
    """``plan``: batch size and optimizer steps of each run; returns all batches, and steps left where each resumed."""
    state, batches, left = None, [], []
    for size, steps in plan:
        order = make(size)
        if state is not None:
            order.load_state_dict(json.loads(json.dumps(state)))
        left.append(order.steps_left(epochs))
        batches += trained(order, steps, epochs)
        state = order.state_dict()
    return batches, left


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["plain", "by length"])
@pytest.mark.parametrize(
    "plan",
    [
        [(8, 5), (8, 999)],  # unchanged
        [(8, 5), (16, 999)],  # inside an epoch, and 40 rows are no multiple of 16
        [(8, 5), (3, 4), (64, 1), (7, 999)],
        [(8, 13), (5, 999)],  # at the end of an epoch, whose last batch has 7 rows
        [(8, 12), (100, 999)],  # 7 rows are left of it
        [(103, 1), (8, 999)],
        [(8, 999), (4, 999)],  # nothing is left
    ],
)
def test_each_epoch_sees_each_row_once(lengths, plan):
    def make(size: int) -> EpochOrder:
        return EpochOrder(Epochs.of_all(103), size, 3, lengths)

    batches, left = resumed(make, plan, epochs=3)
    rows = sum(batches, [])
    assert [sorted(rows[start : start + 103]) for start in (0, 103, 206)] == [list(range(103))] * 3
    made = [min(steps, left) for (_, steps), left in zip(plan, left, strict=True)]
    assert len(batches) == sum(made) and left[-1] == made[-1]  # the number of steps is known beforehand


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["plain", "by length"])
def test_with_an_unchanged_batch_size_the_batches_are_those_of_a_run_that_was_not_stopped(lengths):
    def make(size: int) -> EpochOrder:
        return EpochOrder(Epochs.of_all(103), size, 3, lengths)

    whole, _ = resumed(make, [(8, 999)], 3)
    for stop in (1, 12, 13, 14, 26, 38):
        assert resumed(make, [(8, stop), (8, 999)], 3)[0] == whole


def test_more_epochs_go_on_behind_the_last():
    def make(size: int) -> EpochOrder:
        return EpochOrder(Epochs.of_all(103), size, 3)

    order = make(8)
    assert len(trained(order, 999, 1)) == 13 and order.steps_left(1) == 13
    again = make(8)
    again.load_state_dict(order.state_dict())
    assert again.steps_left(1) == 0 and again.steps_left(3) == 26
    assert trained(again, 999, 3) == resumed(make, [(8, 999)], 3)[0][13:]


@pytest.mark.parametrize("steps, seen", [(0, (0, 0)), (5, (0, 40)), (13, (1, 0)), (14, (1, 8)), (39, (3, 0))])
def test_a_checkpoint_that_knows_its_step_alone_was_written_with_this_batch_size(steps, seen):
    order = EpochOrder(Epochs.of_all(103), 8, 3)
    order.resume_behind(steps)
    assert order.resumed_at == seen


def test_other_rows_inside_an_epoch_are_refused():
    order = EpochOrder(Epochs.of_all(103), 8, 3)
    trained(order, 5, 1)
    with pytest.raises(CheckpointError, match="an epoch had 103 rows, 40 of which were seen, and now has 90"):
        EpochOrder(Epochs.of_all(90), 8, 3).load_state_dict(order.state_dict())


@pytest.mark.parametrize(
    "steps, size, rows, a_pass",
    [
        (20, 5, 100, 30),  # as before: 100 rows in passes of 30
        (40, 5, 200, 30),  # more steps over a short text: the last pass of before, of 10 rows, is now a whole one
        (40, 5, 200, 200),  # over a long one, of which now more is read
        (20, 12, 35 + 13 * 12, 30),
        (9, 5, 45, 45),  # fewer
    ],
)
def test_rows_of_a_stream_are_seen_once_when_their_number_changes(steps, size, rows, a_pass):
    before = StreamOrder(100, 30 if a_pass == 30 else 100, 5, 3)
    first = trained(before, 7, 1)
    order = StreamOrder(rows, a_pass, size, 3)
    order.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert order.steps_left(1) == steps - 7
    second = trained(order, 999, 1)
    seen = sum(first + second, [])
    assert len(seen) == len(set(seen)) == rows
    if rows == 100:
        assert first + second == trained(StreamOrder(100, 30, 5, 3), 999, 1)
    if rows > 100:
        assert sorted(seen) == list(range(rows))
