"""From scores to rewards: the order clip, scale, penalize, and where each part lands."""

import pytest
import torch
import twin
from tiny import ragged_mask

from chatrlhf.functional.rewards import shape_scores, token_rewards


def test_scores_are_clipped_then_scaled_then_penalised():
    raw = torch.tensor([12.0, -12.0, 4.0, 4.0])
    finished = torch.tensor([True, True, True, False])
    # clip to +-10: 10, -10, 4, 4;  divide by 2: 5, -5, 2, 2;  minus 1.5 where cut: 0.5
    shaped = shape_scores(raw, finished, cliprange_reward=10.0, scale=2.0, missing_eos_penalty=1.5)
    assert shaped.tolist() == [5.0, -5.0, 2.0, 0.5]


def test_what_is_off_leaves_scores_alone():
    raw = torch.tensor([12.0, -3.0])
    assert shape_scores(raw, torch.tensor([True, False]), None, 1.0, None).tolist() == [12.0, -3.0]


def test_the_penalty_is_not_clipped_away():
    # The clip is at 1 and the score below it; the penalty still takes the whole 2 off: -1 - 2 = -3.
    assert shape_scores(torch.tensor([-9.0]), torch.tensor([False]), 1.0, 1.0, 2.0).tolist() == [-3.0]


def test_rewards_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]])
    ref = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -7.0, -7.0]])
    mask = ragged_mask([3, 1])
    # row 0: log pi - log pi_ref = 0.5, -1, 0;  times -0.1 = -0.05, 0.1, 0;  the score 2 joins the last
    # row 1: 0.5 * -0.1 = -0.05, plus the score 7 on its only token
    rewards = token_rewards(torch.tensor([2.0, 7.0]), logprobs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.1, 2.0], [6.95, 0.0, 0.0]]))


def test_the_score_sits_on_each_rows_last_real_token():
    lengths = [4, 1, 6, 2]
    mask = ragged_mask(lengths)
    same = torch.randn(mask.shape)  # policy == reference: nothing but the score is left
    rewards = token_rewards(torch.tensor([1.0, 2.0, 3.0, 4.0]), same, same, mask, kl_coef=0.3)
    expected = torch.zeros(mask.shape)
    for row, length in enumerate(lengths):
        expected[row, length - 1] = row + 1.0
    assert torch.equal(rewards, expected)


@pytest.mark.parametrize("padding", [torch.nan, torch.inf])
def test_nothing_flows_in_from_the_padding(padding):
    mask = ragged_mask([2, 5])
    logprobs = torch.randn(mask.shape).masked_fill(~mask, padding)
    rewards = token_rewards(torch.ones(2), logprobs, torch.zeros(mask.shape), mask, 0.1)
    assert rewards.isfinite().all()
    assert (rewards[~mask] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_rewards_plus_beta_kl_sum_to_the_shaped_score(seed):
    torch.manual_seed(seed)
    mask = ragged_mask(torch.randint(1, 7, (6,)).tolist())
    logprobs, ref = torch.randn(mask.shape), torch.randn(mask.shape)
    scores = shape_scores(torch.randn(6) * 9, torch.rand(6) < 0.5, 5.0, 1.7, 0.4)
    rewards = token_rewards(scores, logprobs, ref, mask, kl_coef=0.2)
    kl = ((logprobs - ref) * mask).sum(1)
    torch.testing.assert_close(rewards.sum(1) + 0.2 * kl, scores)


@pytest.mark.parametrize("seed", range(3))
def test_rewards_agree_with_the_twin(seed):
    torch.manual_seed(seed)
    mask = ragged_mask(torch.randint(1, 7, (5,)).tolist())
    scores, logprobs, ref = torch.randn(5), torch.randn(mask.shape), torch.randn(mask.shape)
    expected = twin.token_rewards(scores.tolist(), logprobs.tolist(), ref.tolist(), mask.tolist(), 0.07)
    torch.testing.assert_close(token_rewards(scores, logprobs, ref, mask, 0.07), torch.tensor(expected))
