"""Which rows each epoch sees, when not every row can be used."""

import numpy as np
import pytest

from chatrlhf.data.epochs import Epochs
from chatrlhf.errors import DataError


def test_every_epoch_sees_all_rows_where_nothing_else_is_said():
    epochs = Epochs.of_all(4)
    assert epochs.size == 4 and epochs.of(0).tolist() == epochs.of(7).tolist() == [0, 1, 2, 3]
    assert epochs.only([1, 3], "x").of(2).tolist() == [0, 1]


def test_epochs_stay_alike_in_length():
    epochs = Epochs((np.array([4, 0, 1]), np.array([2, 3, 4])))
    left = epochs.only([0, 1, 4], "x")  # the second epoch has one of them
    assert [rows.tolist() for rows in left.rows] == [[2], [2]] and left.size == 1
    assert epochs.seen().tolist() == [4, 0, 1, 2, 3, 4]
    assert [rows.tolist() for rows in epochs.only(range(5), "x").rows] == [rows.tolist() for rows in epochs.rows]


def test_a_row_that_is_seen_twice_stays_so():
    assert Epochs((np.array([2, 0, 2]),)).only([0, 2], "x").of(0).tolist() == [1, 0, 1]


def test_an_epoch_without_rows_is_refused():
    with pytest.raises(DataError, match="my/rows.json: no row of epoch 2 is short enough .*raise max_sequence_length"):
        Epochs((np.array([0, 1]), np.array([2, 3]))).only([0, 1], "my/rows.json")
