"""GAE and the group estimators, by hand, against limiting cases and against the twin."""

import pytest
import torch
import twin
from tiny import ragged_mask

from chatrlhf.functional.advantages import gae, group_normalised, leave_one_out


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rewards, values, mask of five ragged rows."""
    torch.manual_seed(seed)
    mask = ragged_mask(torch.randint(1, 9, (5,)).tolist())
    return torch.randn(mask.shape), torch.randn(mask.shape), mask


def test_gae_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 2.0]])
    values = torch.tensor([[0.5, 1.0, -1.0]])
    # gamma 0.9, lambda 0.5, so gamma * lambda = 0.45
    # delta_2 = 2 + 0          - (-1)  =  3        A_2 = 3
    # delta_1 = 0 + 0.9 * (-1) - 1     = -1.9      A_1 = -1.9 + 0.45 * 3     = -0.55
    # delta_0 = 1 + 0.9 * 1    - 0.5   =  1.4      A_0 =  1.4 + 0.45 * -0.55 =  1.1525
    advantages, returns = gae(rewards, values, ragged_mask([3]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[1.1525, -0.55, 3.0]]))
    # return = A + V
    torch.testing.assert_close(returns, torch.tensor([[1.6525, 0.45, 2.0]]))


def test_a_shorter_row_ends_where_its_mask_ends():
    rewards = torch.tensor([[1.0, 5.0, 5.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[0.25, 8.0, 8.0], [0.0, 0.0, 0.0]])
    # row 0 has one token and nothing behind it: A = 1 + 0 - 0.25;  row 1: 1 discounted by 0.5 * 0.5 a token
    advantages, returns = gae(rewards, values, ragged_mask([1, 3]), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.75, 0.0, 0.0], [0.0625, 0.25, 1.0]]
    assert returns.tolist() == [[1.0, 0.0, 0.0], [0.0625, 0.25, 1.0]]


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_lambda_1_gives_monte_carlo_returns(gamma):
    rewards, values, mask = random_case(0)
    _, returns = gae(rewards, values, mask, gamma, lam=1.0)
    torch.testing.assert_close(returns, torch.tensor(twin.discounted_returns(rewards.tolist(), mask.tolist(), gamma)))


def test_lambda_0_gives_the_one_step_error():
    rewards, values, mask = random_case(1)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    for i, t in twin.real(mask.tolist()):
        behind = values[i, t + 1] if t + 1 < mask[i].sum() else 0.0
        torch.testing.assert_close(advantages[i, t], rewards[i, t] + 0.9 * behind - values[i, t])


@pytest.mark.parametrize("seed", range(4))
def test_gae_agrees_with_the_twin_on_ragged_masks(seed):
    rewards, values, mask = random_case(seed)
    expected = twin.gae(rewards.tolist(), values.tolist(), mask.tolist(), 0.97, 0.9)
    for got, want in zip(gae(rewards, values, mask, 0.97, 0.9), expected, strict=True):
        torch.testing.assert_close(got, torch.tensor(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_nothing_flows_in_from_the_padding(poison):
    rewards, values, mask = random_case(2)
    clean = gae(rewards, values, mask, 0.97, 0.9)
    poisoned = gae(rewards.masked_fill(~mask, poison), values.masked_fill(~mask, poison), mask, 0.97, 0.9)
    for got, want in zip(poisoned, clean, strict=True):
        assert torch.equal(got, want)
        assert (got[~mask] == 0).all()


def test_more_padding_changes_nothing():
    rewards, values, mask = random_case(3)
    wide = [torch.nn.functional.pad(x, (0, 4)) for x in (rewards, values, mask)]
    for got, want in zip(gae(*wide, 0.97, 0.9), gae(rewards, values, mask, 0.97, 0.9), strict=True):
        assert torch.equal(got[:, : mask.shape[1]], want)


def test_the_inputs_are_left_as_they_were():
    rewards, values, mask = random_case(0)
    before = rewards.clone(), values.clone()
    gae(rewards, values, mask, 0.97, 0.9)
    assert torch.equal(rewards, before[0]) and torch.equal(values, before[1])


# ----- groups


def test_leave_one_out_by_hand():
    scores, groups = torch.tensor([1.0, 3.0, 8.0, 5.0, 6.0]), torch.tensor([0, 0, 0, 7, 7])
    # group 0: 1 - (3+8)/2 = -4.5;  3 - (1+8)/2 = -1.5;  8 - (1+3)/2 = 6;  group 7: 5 - 6, 6 - 5
    assert leave_one_out(scores, groups).tolist() == [-4.5, -1.5, 6.0, -1.0, 1.0]


def test_group_normalised_by_hand():
    scores, groups = torch.tensor([1.0, 3.0, 10.0, 10.0]), torch.tensor([4, 4, 2, 2])
    # group 4: mean 2, deviation sqrt((1 + 1) / (2 - 1)) = 1.41421;  -1 / (1.41421 + 0.0001) = -0.70706
    expected = torch.tensor([-0.70706, 0.70706, 0.0, 0.0])
    torch.testing.assert_close(group_normalised(scores, groups), expected, rtol=0, atol=1e-5)


def test_a_group_of_equal_scores_has_advantage_0():
    scores, groups = torch.tensor([2.5] * 4), torch.zeros(4, dtype=torch.long)
    assert leave_one_out(scores, groups).tolist() == [0.0] * 4
    assert group_normalised(scores, groups).tolist() == [0.0] * 4


def test_rows_of_a_group_need_not_stand_together():
    scores, groups = torch.tensor([1.0, 5.0, 3.0, 6.0]), torch.tensor([0, 1, 0, 1])
    assert leave_one_out(scores, groups).tolist() == [-2.0, -1.0, 2.0, 1.0]


@pytest.mark.parametrize("seed", range(3))
def test_group_estimators_agree_with_the_twin(seed):
    torch.manual_seed(seed)
    scores, groups = torch.randn(12), torch.tensor([0, 1, 2] * 4)[torch.randperm(12)]
    rows, ids = scores.tolist(), groups.tolist()
    torch.testing.assert_close(leave_one_out(scores, groups), torch.tensor(twin.leave_one_out(rows, ids)))
    expected = torch.tensor(twin.group_normalised(rows, ids, 1e-4))
    torch.testing.assert_close(group_normalised(scores, groups), expected, rtol=1e-5, atol=1e-5)
