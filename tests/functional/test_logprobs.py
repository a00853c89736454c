"""The one distribution that is sampled and scored: its log-probabilities, its entropy, its sampler."""

import math

import pytest
import torch
import twin

from chatrlhf.functional.logprobs import (
    SamplingDistribution,
    entropy_from_logits,
    sample_by_inversion,
    selected_logprobs,
    token_logprobs,
)

NEVER = -torch.inf
JUST_UNDER_1 = 1 - 2**-24  # the largest number torch.rand can give in float32


def at(*positions: int, minimum: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """position and min_new_tokens for ``adjust``."""
    return torch.tensor(positions), torch.full((len(positions),), minimum)


# ----- log-probabilities


def test_logprob_by_hand():
    # softmax of [0, log 3] is [1/4, 3/4]
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    expected = torch.tensor([math.log(0.25), math.log(0.75)])
    torch.testing.assert_close(selected_logprobs(logits, torch.tensor([0, 1])), expected)


def test_logprobs_are_those_of_the_log_softmax():
    logits, ids = torch.randn(7, 11) * 5, torch.randint(0, 11, (7,))
    expected = [twin.log_softmax(row)[i] for row, i in zip(logits.tolist(), ids.tolist(), strict=True)]
    torch.testing.assert_close(selected_logprobs(logits, ids), torch.tensor(expected))


def test_large_logits_do_not_overflow():
    assert selected_logprobs(torch.tensor([[5000.0, 0.0]]), torch.tensor([0])).item() == 0.0


def test_forbidden_tokens_leave_logprobs_and_their_gradient_finite():
    logits = torch.tensor([[0.0, NEVER, math.log(3)]], requires_grad=True)
    logprob = selected_logprobs(logits, torch.tensor([2]))
    logprob.sum().backward()
    assert logprob.item() == pytest.approx(math.log(0.75))
    # d log p_2 / d logits = onehot - p = [-1/4, 0, 1 - 3/4]
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.0, 0.25]]))


# ----- entropy


def test_entropy_of_the_uniform_is_log_v():
    assert entropy_from_logits(torch.full((1, 8), 3.0)).item() == pytest.approx(math.log(8))


def test_entropy_by_hand():
    # p = [1/4, 3/4]: 1/4 log 4 + 3/4 log 4/3 = 0.34657 + 0.21576
    assert entropy_from_logits(torch.tensor([[0.0, math.log(3)]])).item() == pytest.approx(0.56233, abs=1e-5)


def test_forbidden_tokens_leave_entropy_and_its_gradient_finite():
    logits = torch.tensor([[0.0, NEVER, math.log(3), NEVER]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.56233, abs=1e-5)
    # dH/dz_i = -p_i (log p_i + H):  1/4: -0.25 (-1.38629 + 0.56233) = 0.20599, and minus that for the other
    torch.testing.assert_close(logits.grad, torch.tensor([[0.20599, 0.0, -0.20599, 0.0]]), rtol=0, atol=1e-5)


def test_entropy_agrees_with_the_twin():
    logits = torch.randn(5, 9) * 3
    expected = torch.tensor([twin.entropy(row) for row in logits.tolist()])
    torch.testing.assert_close(entropy_from_logits(logits), expected)


# ----- both at once, in chunks of rows

# 70,000 columns: three rows a chunk, so seven rows are three chunks, the last one short.
SIZES = {"one chunk": (7, 11), "three chunks": (7, 70_000), "a row wider than a chunk": (2, 2**18 + 3)}
HARD = SamplingDistribution(temperature=0.7, eos_token_ids=(1, 4), forbidden_ids=(0,))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("distribution", [SamplingDistribution(), HARD], ids=["plain", "hard"])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_token_logprobs_are_the_composition_gradients_included(size, distribution, with_entropy):
    rows, columns = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, columns, generator=generator) * 2).requires_grad_()
    twin_logits = logits.detach().double().requires_grad_()  # adjust makes it float32, like the product
    ids = torch.randint(5, columns, (rows,), generator=generator)
    where = torch.arange(rows) % 4, torch.full((rows,), 2)  # EOS is forbidden in some rows
    weights = torch.randn(2, rows, generator=generator)

    logprobs, entropy = token_logprobs(logits, ids, *where, distribution, with_entropy)
    adjusted = distribution.adjust(twin_logits, *where)
    expected = selected_logprobs(adjusted, ids)
    torch.testing.assert_close(logprobs, expected)
    total, expected_total = (weights[0] * logprobs).sum(), (weights[0] * expected).sum()
    if with_entropy:
        # Two float32 sums over up to 262,147 tokens, in another order.
        torch.testing.assert_close(entropy, entropy_from_logits(adjusted), rtol=2e-5, atol=1e-5)
        total = total + (weights[1] * entropy).sum()
        expected_total = expected_total + (weights[1] * entropy_from_logits(adjusted)).sum()
    else:
        assert entropy is None
    total.backward()
    expected_total.backward()
    torch.testing.assert_close(logits.grad, twin_logits.grad.float(), rtol=1e-4, atol=1e-6)


def test_token_logprobs_of_half_precision_logits_are_computed_in_float32():
    logits = (torch.randn(6, 50, generator=torch.Generator().manual_seed(1)) * 3).bfloat16()
    ids, where = torch.arange(6), at(*range(6))
    got, _ = token_logprobs(logits, ids, *where, HARD)
    want, _ = token_logprobs(logits.float(), ids, *where, HARD)
    assert got.dtype == torch.float32 and torch.equal(got[2:4], want[2:4])  # ids 0, 1 and 4 are masked somewhere


def test_a_loss_of_the_entropy_alone():
    logits = torch.tensor([[0.0, NEVER, math.log(3), NEVER]], requires_grad=True)
    _, entropy = token_logprobs(logits, torch.tensor([0]), *at(0), SamplingDistribution(), with_entropy=True)
    entropy.sum().backward()
    # As by hand above.
    torch.testing.assert_close(logits.grad, torch.tensor([[0.20599, 0.0, -0.20599, 0.0]]), rtol=0, atol=1e-5)


# ----- the distribution


def test_temperature_divides_the_logits():
    logits = SamplingDistribution(temperature=0.5).adjust(torch.tensor([[1.0, -2.0]]), *at(0))
    assert logits.tolist() == [[2.0, -4.0]]


def test_forbidden_ids_have_probability_0_at_every_position():
    distribution = SamplingDistribution(forbidden_ids=(0, 3))
    probabilities = distribution.adjust(torch.zeros(2, 4), *at(0, 9)).softmax(-1)
    assert probabilities.tolist() == [[0.0, 0.5, 0.5, 0.0]] * 2


def test_eos_has_probability_0_only_before_the_rows_minimum():
    distribution = SamplingDistribution(eos_token_ids=(1, 2))
    position, minimum = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 2, 0])
    probabilities = distribution.adjust(torch.zeros(4, 4), position, minimum).softmax(-1)
    assert probabilities.tolist() == [[0.5, 0, 0, 0.5], [0.5, 0, 0, 0.5], [0.25] * 4, [0.25] * 4]


def test_probabilities_sum_to_1_over_the_allowed_tokens():
    distribution = SamplingDistribution(temperature=0.7, eos_token_ids=(1,), forbidden_ids=(0,))
    logits = distribution.adjust(torch.randn(1, 6), *at(0, minimum=1)).expand(4, 6)
    total = selected_logprobs(logits, torch.tensor([2, 3, 4, 5])).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_models_logits_are_left_as_they_were(temperature):
    logits = torch.zeros(1, 4)
    SamplingDistribution(temperature, eos_token_ids=(1,), forbidden_ids=(0,)).adjust(logits, *at(0, minimum=1))
    assert logits.tolist() == [[0.0] * 4]


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    adjusted = SamplingDistribution(temperature=0.3).adjust(logits, *at(0))
    torch.testing.assert_close(adjusted, torch.tensor([[1.0, 2.0]]) / 0.3)


# ----- the sampler


def draw(logits: list[float], *uniform: float) -> list[int]:
    return sample_by_inversion(torch.tensor([logits] * len(uniform)), torch.tensor(uniform))[0].tolist()


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    quarter = [math.log(0.25), math.log(0.5), math.log(0.25)]  # cumulative 0.25, 0.75, 1
    assert draw(quarter, 0.0, 0.24, 0.26, 0.74, 0.76, 0.99) == [0, 0, 1, 1, 2, 2]


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token():
    assert draw([0.0] * 5, 0.0, JUST_UNDER_1) == [0, 4]


def test_forbidden_first_and_last_tokens_are_never_drawn():
    logits = [NEVER, NEVER, 0.0, 0.0, NEVER, NEVER]
    assert draw(logits, 0.0, 0.4999, 0.5001, JUST_UNDER_1) == [2, 2, 3, 3]


def test_a_number_that_rounds_up_to_1_draws_the_last_token_that_is_allowed():
    # A float64 so close to 1 that it becomes 1 in the float32 of the cumulative distribution.
    logits, uniform = torch.tensor([[0.0, 0.0, NEVER]]), torch.tensor([1 - 1e-12], dtype=torch.float64)
    assert sample_by_inversion(logits, uniform)[0].tolist() == [1]


def test_forbidden_tokens_between_others_are_never_drawn():
    # A number that falls exactly on the border 1/2 belongs to the next token that can be drawn.
    assert draw([0.0, NEVER, NEVER, 0.0], 0.4999, 0.5, 0.5001) == [0, 3, 3]


def test_no_number_draws_a_forbidden_token_from_a_large_vocabulary():
    torch.manual_seed(3)
    forbidden = torch.rand(200, 5000) < 0.5
    logits = (torch.randn(200, 5000) * 4).masked_fill(forbidden, NEVER)
    uniform = torch.cat([torch.zeros(20), torch.full((20,), JUST_UNDER_1), torch.rand(160)])
    drawn, _ = sample_by_inversion(logits, uniform)
    assert not forbidden[torch.arange(200), drawn].any()


def test_drawn_frequencies_are_the_probabilities():
    logits = torch.tensor([0.0, 1.0, -1.0, NEVER, 2.0])
    count = 20000
    drawn, _ = sample_by_inversion(logits.expand(count, 5), torch.rand(count))
    expected = logits.softmax(0) * count
    seen = torch.bincount(drawn, minlength=5)
    allowed = expected > 0
    chi_square = ((seen - expected)[allowed] ** 2 / expected[allowed]).sum().item()
    assert seen[3] == 0
    assert chi_square < 16.27  # 3 degrees of freedom, exceeded by chance once in 1,000 seeds
