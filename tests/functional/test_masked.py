"""Means, variances and whitening see real tokens only."""

import pytest
import torch
import twin
from tiny import ragged_mask

from chatrlhf.functional.masked import masked_mean, masked_var, whiten

MASK = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("padding", [7.0, float("nan"), float("inf")])
def test_mean_and_variance_by_hand_whatever_the_padding_holds(padding):
    values = torch.tensor([[1.0, 2.0, padding], [6.0, padding, padding]])
    # (1 + 2 + 6) / 3 = 3;  ((1-3)^2 + (2-3)^2 + (6-3)^2) / 3 = (4 + 1 + 9) / 3
    assert masked_mean(values, MASK).item() == pytest.approx(3.0)
    assert masked_var(values, MASK).item() == pytest.approx(14 / 3)


def test_mean_of_nothing_is_0():
    assert masked_mean(torch.full((2, 2), torch.nan), torch.zeros(2, 2, dtype=torch.bool)).item() == 0.0


def test_padding_of_the_mean_gets_no_gradient():
    values = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, 5.0]], requires_grad=True)
    masked_mean(values, MASK).backward()
    assert values.grad.tolist() == [
        [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0],
        [pytest.approx(1 / 3), 0.0, 0.0],
    ]


def test_whiten_by_hand():
    values = torch.tensor([[1.0, 3.0, torch.nan], [2.0, torch.inf, 9.0]])
    # mean 2, variance (1 + 1 + 0) / 3 = 2/3, deviation sqrt(2/3) = 0.81650;  1 / 0.81650 = 1.22474
    expected = torch.tensor([[-1.22474, 1.22474, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(whiten(values, MASK), expected, rtol=0, atol=1e-5)


def test_whitened_tokens_have_mean_0_and_variance_1_and_padding_is_0():
    mask = ragged_mask([5, 1, 9, 3])
    whitened = whiten(torch.randn(4, 9) * 3 + 5, mask)
    assert whitened[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert whitened[mask].var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert (whitened[~mask] == 0).all()


def test_constant_input_whitens_to_0():
    assert whiten(torch.full((2, 3), 4.0), MASK).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_twin_on_ragged_masks(seed):
    torch.manual_seed(seed)
    mask = ragged_mask(torch.randint(1, 8, (5,)).tolist())
    values = torch.randn(mask.shape)
    rows, is_real = values.tolist(), mask.tolist()
    assert masked_mean(values, mask).item() == pytest.approx(twin.mean(rows, is_real), rel=1e-5, abs=1e-6)
    assert masked_var(values, mask).item() == pytest.approx(twin.variance(rows, is_real), rel=1e-5)
    torch.testing.assert_close(whiten(values, mask), torch.tensor(twin.whiten(rows, is_real)), rtol=1e-4, atol=1e-5)
