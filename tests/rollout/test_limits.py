"""How long each row of a rollout may and must be."""

import pytest
import torch

from chatrlhf.rollout.context import Limits


def per_row(prompt_lengths: list[int], **limits: int) -> tuple[list[int], list[int]]:
    most, fewest = Limits(**limits).per_row(torch.tensor(prompt_lengths))
    return most.tolist(), fewest.tolist()


def test_max_length_counts_the_prompt():
    # 10 in all: a prompt of 3 leaves 7 but max_new_tokens is 5; a prompt of 8 leaves 2
    assert per_row([3, 8], max_new_tokens=5, max_length=10)[0] == [5, 2]


def test_min_length_counts_the_prompt():
    # 6 in all: a prompt of 2 needs 4 more, a prompt of 9 none; min_new_tokens asks for 1 at least
    assert per_row([2, 9], max_new_tokens=8, max_length=20, min_new_tokens=1, min_length=6)[1] == [4, 1]


def test_a_row_need_not_be_longer_than_it_may_be():
    assert per_row([8], max_new_tokens=5, max_length=10, min_new_tokens=4) == ([2], [2])


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="prompt of 10 tokens leaves no room in 10"):
        per_row([10], max_new_tokens=5, max_length=10)
