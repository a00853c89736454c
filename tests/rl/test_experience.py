"""From a scored rollout to advantages: each algorithm by hand, and PPO's whole chain against the twin."""

import pytest
import torch
import twin
from tiny import prompts, ragged_mask, rollout

from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.types import ScoredRollout

LENGTHS = [3, 1, 5, 2]


def scored(seed: int = 0, values: bool = True) -> ScoredRollout:
    """Four sequences, two prompts of two samples each."""
    torch.manual_seed(seed)
    mask = ragged_mask(LENGTHS)
    old, ref, value = (torch.randn(mask.shape) * mask for _ in range(3))
    scores = torch.randn(4)
    batch = rollout(prompts([2, 4], samples=2), LENGTHS)
    return ScoredRollout(batch, scores, scores, old, ref, value if values else None, entropy=0.0)


def by_hand() -> ScoredRollout:
    """Two samples of one prompt, two tokens and one; policy minus reference: 0.5, -0.25 and 1."""
    mask = ragged_mask([2, 1])
    ref = torch.tensor([[-1.0, -2.0], [-3.0, 0.0]])
    old = torch.tensor([[-0.5, -2.25], [-2.0, 0.0]])
    scores = torch.tensor([3.0, 1.0])
    values = torch.zeros(mask.shape)
    batch = rollout(prompts([3], samples=2), [2, 1])
    return ScoredRollout(batch, scores, scores, old, ref, values, entropy=0.0)


def test_rloo_by_hand():
    experience = make_experience(by_hand(), ALGORITHMS["rloo"], Estimation(kl_coef=0.2))
    # KL of the sequences: 0.5 - 0.25 = 0.25 and 1;  score - 0.2 KL: 2.95 and 0.8;  less the other's: +-2.15
    torch.testing.assert_close(experience.advantages, torch.tensor([[2.15, 2.15], [-2.15, 0.0]]))
    assert experience.returns is None


def test_grpo_by_hand():
    experience = make_experience(by_hand(), ALGORITHMS["grpo"], Estimation(kl_coef=0.2))
    # scores 3 and 1: mean 2, deviation 1.41421; the KL is not in them.  1 / (1.41421 + 0.0001) = 0.70706
    expected = torch.tensor([[0.70706, 0.70706], [-0.70706, 0.0]])
    torch.testing.assert_close(experience.advantages, expected, rtol=0, atol=1e-5)
    assert experience.returns is None


def test_ppo_by_hand():
    how = Estimation(kl_coef=0.2, gamma=1.0, lam=1.0, whiten_advantages=False)
    experience = make_experience(by_hand(), ALGORITHMS["ppo"], how)
    # rewards: -0.2 * 0.5 = -0.1 and -0.2 * -0.25 + 3 = 3.05;  -0.2 * 1 + 1 = 0.8.  Values 0: returns are sums.
    torch.testing.assert_close(experience.returns, torch.tensor([[2.95, 3.05], [0.8, 0.0]]))
    torch.testing.assert_close(experience.advantages, experience.returns)


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("seed", range(2))
def test_ppo_agrees_with_the_twin(seed, whiten):
    given = scored(seed)
    experience = make_experience(given, ALGORITHMS["ppo"], Estimation(0.1, 0.98, 0.9, whiten))
    mask = given.rollout.response_mask.tolist()
    rewards = twin.token_rewards(
        given.scores.tolist(), given.old_logprobs.tolist(), given.ref_logprobs.tolist(), mask, 0.1
    )
    advantages, returns = twin.gae(rewards, given.values.tolist(), mask, 0.98, 0.9)
    if whiten:
        advantages = twin.whiten(advantages, mask)
    torch.testing.assert_close(experience.advantages, torch.tensor(advantages), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(experience.returns, torch.tensor(returns), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_ids_that_are_trained_are_the_ids_that_were_sampled(name):
    given = scored()
    experience = make_experience(given, ALGORITHMS[name], Estimation(0.1))
    assert experience.response_ids is given.rollout.response_ids
    assert experience.response_mask is given.rollout.response_mask
    assert experience.prompt_ids is given.rollout.prompts.input_ids
    assert experience.old_logprobs is given.old_logprobs
    assert experience.min_new_tokens is given.rollout.min_new_tokens


@pytest.mark.parametrize("name", ALGORITHMS)
def test_advantages_of_padding_are_0(name):
    given = scored()
    advantages = make_experience(given, ALGORITHMS[name], Estimation(0.1)).advantages
    assert (advantages[~given.rollout.response_mask] == 0).all()
    assert (advantages[given.rollout.response_mask] != 0).all()


def test_select_takes_the_same_rows_of_everything():
    given = scored()
    given.trunk_states = torch.randn(4, 9, 3)
    experience = make_experience(given, ALGORITHMS["ppo"], Estimation(0.1))
    picked = experience.select(torch.tensor([2, 0]))
    assert len(picked) == 2
    for name, value in vars(experience).items():
        if name != "trunk_rows":
            assert torch.equal(getattr(picked, name), value[[2, 0]])
    assert torch.equal(picked.own_trunk_states, given.trunk_states[[2, 0]])


def test_select_finds_states_that_do_not_stand_row_by_row():
    given = scored()
    given.trunk_states, given.trunk_rows = torch.randn(2, 9, 3), torch.tensor([1, -1, 0])
    experience = make_experience(given, ALGORITHMS["ppo"], Estimation(0.1))
    picked = experience.select(torch.tensor([2, 1, 0])).select(torch.tensor([2, 0]))
    assert torch.equal(picked.own_trunk_states, given.trunk_states[[1, 0]])


def test_select_keeps_what_is_missing_missing():
    experience = make_experience(scored(values=False), ALGORITHMS["rloo"], Estimation(0.1))
    picked = experience.select(torch.tensor([1]))
    assert picked.returns is None and picked.old_values is None


def test_kl_to_reference_is_a_sum_over_tokens_and_a_mean_over_sequences():
    # (0.5 - 0.25) and 1: mean 0.625 nats per sequence
    assert by_hand().kl_to_reference == pytest.approx(0.625)
