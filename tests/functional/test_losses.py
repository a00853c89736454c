"""Both sides of both clips: the value of the loss and the gradient it gives."""

import math

import pytest
import torch

from chatrlhf.functional.losses import policy_clipped, policy_loss, token_weights, value_loss

RATIOS = [1.5, 0.5, 1.1, 0.9]  # with eps 0.2: above, below, inside, inside


def policy_case(advantage: float) -> tuple[list[float], list[float]]:
    """Loss at each of RATIOS, and its gradient by the log-probability. Old probability: 0.4."""
    old = torch.full((1, 4), math.log(0.4))
    logprobs = (old + torch.tensor([RATIOS]).log()).requires_grad_()
    loss = policy_loss(logprobs, old, torch.full((1, 4), advantage), cliprange=0.2)
    loss.sum().backward()
    return loss[0].tolist(), logprobs.grad[0].tolist()


def test_policy_loss_with_a_good_action():
    loss, gradient = policy_case(advantage=2.0)
    # -min(r A, clip(r, 0.8, 1.2) A): r 1.5 -> -min(3, 2.4);  0.5 -> -min(1, 1.6);  1.1 -> -2.2;  0.9 -> -1.8
    assert loss == pytest.approx([-2.4, -1.0, -2.2, -1.8])
    # d(-r A)/dlogprob = -r A where the unclipped term is active; 0 above the clip
    assert gradient == pytest.approx([0.0, -1.0, -2.2, -1.8])


def test_policy_loss_with_a_bad_action():
    loss, gradient = policy_case(advantage=-2.0)
    # r 1.5 -> -min(-3, -2.4) = 3;  0.5 -> -min(-1, -1.6) = 1.6;  1.1 -> 2.2;  0.9 -> 1.8
    assert loss == pytest.approx([3.0, 1.6, 2.2, 1.8])
    # 0 below the clip: the action is already rare enough
    assert gradient == pytest.approx([3.0, 0.0, 2.2, 1.8])


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    policy_loss(logprobs, logprobs.detach(), torch.tensor([[3.0, -5.0]]), 0.2).sum().backward()
    assert logprobs.grad.tolist() == [[-3.0, 5.0]]


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
def test_a_token_counts_as_clipped_where_the_clip_took_its_gradient(advantage):
    old = torch.full((1, 200), -1.0)
    logprobs = (old + torch.linspace(-0.5, 0.5, 200)).requires_grad_()
    advantages = torch.full((1, 200), advantage)
    policy_loss(logprobs, old, advantages, 0.2).sum().backward()
    clipped = policy_clipped(logprobs, old, advantages, 0.2)
    assert torch.equal(clipped, (logprobs.grad == 0) & (advantages != 0))
    assert clipped.any() == (advantage != 0)


def value_case(values: list[float], target: float, eps: float | None = 0.2) -> tuple[list[float], list[float]]:
    """Loss and gradient at values whose old value is 1."""
    new = torch.tensor([values], requires_grad=True)
    loss = value_loss(new, torch.ones_like(new), torch.full_like(new, target), eps)
    loss.sum().backward()
    return loss[0].tolist(), new.grad[0].tolist()


def test_value_loss_carries_the_half():
    # (3 - 1)^2 / 2 = 2, and its derivative is the plain error 3 - 1
    assert value_case([3.0], target=1.0, eps=None) == ([2.0], [2.0])


def test_value_that_overshot_towards_a_higher_return():
    # V_old 1, G 2.  V 1.5: plain (1.5-2)^2 = 0.25, clipped to 1.2 (1.2-2)^2 = 0.64 -> half of the larger 0.32,
    # which is constant in V: no gradient.  V 1.1 lies inside: (1.1-2)^2 / 2 = 0.405, gradient -0.9.
    loss, gradient = value_case([1.5, 1.1], target=2.0)
    assert loss == pytest.approx([0.32, 0.405])
    assert gradient == pytest.approx([0.0, -0.9])


def test_value_that_overshot_towards_a_lower_return():
    # G 0.  V 0.5: plain 0.25, clipped to 0.8: 0.64 -> 0.32 without gradient.  V 0.9: 0.81 / 2, gradient 0.9.
    loss, gradient = value_case([0.5, 0.9], target=0.0)
    assert loss == pytest.approx([0.32, 0.405])
    assert gradient == pytest.approx([0.0, 0.9])


def test_value_that_went_the_wrong_way_is_not_held_by_the_clip():
    # G 2, V 0.5: plain (0.5-2)^2 = 2.25 beats the clipped (0.8-2)^2 = 1.44;  G 0, V 1.5: the same mirrored
    assert value_case([0.5], target=2.0) == ([pytest.approx(1.125)], [pytest.approx(-1.5)])
    assert value_case([1.5], target=0.0) == ([pytest.approx(1.125)], [pytest.approx(1.5)])


def test_value_that_flew_past_the_return():
    # G 1.3, V 2: plain 0.49 beats the clipped (1.2-1.3)^2 = 0.01: it is pulled back, gradient 0.7
    assert value_case([2.0], target=1.3) == ([pytest.approx(0.245)], [pytest.approx(0.7)])


# ----- weights

MASK = torch.tensor([[True, True, True, False], [True, False, False, False]])


@pytest.mark.parametrize(
    "aggregation, expected",
    [
        ("token_mean", [[1 / 4, 1 / 4, 1 / 4, 0], [1 / 4, 0, 0, 0]]),  # 4 real tokens
        ("sequence_sum", [[1 / 2, 1 / 2, 1 / 2, 0], [1 / 2, 0, 0, 0]]),  # 2 sequences
        ("sequence_mean", [[1 / 6, 1 / 6, 1 / 6, 0], [1 / 2, 0, 0, 0]]),  # 1/3 a token, then 1/2 a sequence
    ],
)
def test_weights_by_hand(aggregation, expected):
    torch.testing.assert_close(token_weights(MASK, aggregation), torch.tensor(expected))


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_of_a_mean_sum_to_1(aggregation):
    assert token_weights(MASK, aggregation).sum().item() == pytest.approx(1.0)


def test_an_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="median"):
        token_weights(MASK, "median")
