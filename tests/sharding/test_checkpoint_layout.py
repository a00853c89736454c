"""A checkpoint's sharded states are read only as they were written."""

from __future__ import annotations

import json

import pytest

from chatrlhf.errors import CheckpointError
from chatrlhf.sharding import checkpoint_layout
from chatrlhf.sharding.checkpoint_layout import SHARDING, check_sharding, write_sharding


class Zero:
    """Of a sharding only its words are written down."""

    def __str__(self) -> str:
        return "DeepSpeed ZeRO-2"


def test_the_same_layout_is_read_and_another_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_layout, "world_size", lambda: 2)
    write_sharding(tmp_path, Zero())
    assert json.loads((tmp_path / SHARDING).read_text(encoding="utf-8")) == {"by": "DeepSpeed ZeRO-2", "processes": 2}
    check_sharding(tmp_path, Zero())
    with pytest.raises(CheckpointError, match="written DeepSpeed ZeRO-2 in 2 processes, and this run has them whole"):
        check_sharding(tmp_path, None)
    monkeypatch.setattr(checkpoint_layout, "world_size", lambda: 3)
    with pytest.raises(CheckpointError, match="in 2 processes, and this run has them DeepSpeed ZeRO-2 in 3 processes"):
        check_sharding(tmp_path, Zero())


def test_whole_states_say_nothing_and_are_not_read_as_shards(tmp_path):
    write_sharding(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
    check_sharding(tmp_path, None)
    with pytest.raises(CheckpointError, match="written whole, and this run has them DeepSpeed ZeRO-2 in 1 processes"):
        check_sharding(tmp_path, Zero())
