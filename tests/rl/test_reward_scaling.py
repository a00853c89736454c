"""Running and reference deviations against numpy's."""

import numpy as np
import pytest
import torch

from chatrlhf.rl.reward_scaling import RewardScaling

BATCHES = [torch.tensor([1.0, 4.0, -2.0]), torch.tensor([10.0, 11.0]), torch.tensor([0.5])]
DONE = [torch.ones(len(batch), dtype=torch.bool) for batch in BATCHES]


def test_running_divides_by_the_deviation_of_all_scores_so_far():
    scaling = RewardScaling("running")
    for i, (batch, done) in enumerate(zip(BATCHES, DONE, strict=True)):
        seen = np.concatenate(BATCHES[: i + 1])
        # Divided, with the mean left in: the sign of a score stays.
        torch.testing.assert_close(scaling(batch, done), batch / float(np.std(seen, ddof=1)))


def test_running_is_exact_far_from_0():
    scaling = RewardScaling("running")
    values = 1e6 + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    for half in values.split(2):
        scaling(half, torch.ones(2, dtype=torch.bool))
    assert scaling.scale == pytest.approx(np.std(values.numpy(), ddof=1), rel=1e-6)


def test_ref_divides_by_the_deviation_of_the_first_batch():
    scaling = RewardScaling("ref")
    for batch, done in zip(BATCHES, DONE, strict=True):
        torch.testing.assert_close(scaling(batch, done), batch / 3.0)  # sqrt((0 + 9 + 9) / 2)


def test_ref_may_be_given():
    scaling = RewardScaling("ref", ref_std=2.0)
    assert scaling(BATCHES[0], DONE[0]).tolist() == [0.5, 2.0, -1.0]


def test_without_a_mode_scores_are_clipped_and_penalised_only():
    scaling = RewardScaling(cliprange=3.0, missing_eos_penalty=1.0)
    assert scaling(BATCHES[0], torch.tensor([True, True, False])).tolist() == [1.0, 3.0, -3.0]


def test_the_deviation_is_that_of_clipped_scores():
    scaling = RewardScaling("running", cliprange=3.0)
    clipped = np.array([1.0, 3.0, -2.0])
    torch.testing.assert_close(
        scaling(BATCHES[0], DONE[0]), torch.tensor(clipped / np.std(clipped, ddof=1), dtype=torch.float32)
    )


@pytest.mark.parametrize("scores", [[5.0], [5.0, 5.0]])
def test_the_scale_is_1_until_two_different_scores_were_seen(scores):
    finished = torch.ones(len(scores), dtype=torch.bool)
    assert RewardScaling("running")(torch.tensor(scores), finished).tolist() == scores


@pytest.mark.parametrize("mode", ["running", "ref"])
def test_state_goes_on_where_it_was(mode):
    first, second = RewardScaling(mode), RewardScaling(mode)
    first(BATCHES[0], DONE[0])
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(BATCHES[1], DONE[1]), second(BATCHES[1], DONE[1]))
    assert first.scale == second.scale != 1.0


@pytest.mark.parametrize("mode, other", [("running", "ref"), ("ref", "running"), (None, "running"), (None, "ref")])
def test_another_mode_goes_on_as_if_it_had_been_that_from_the_beginning(mode, other):
    first, second, want = RewardScaling(mode), RewardScaling(other), RewardScaling(other)
    for batch, done in list(zip(BATCHES, DONE, strict=True))[:2]:
        first(batch, done)
        want(batch, done)
    second.load_state_dict(first.state_dict())
    assert second.scale == want.scale
    assert torch.equal(second(BATCHES[2], DONE[2]), want(BATCHES[2], DONE[2]))
