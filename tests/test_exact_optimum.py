"""PPO reaches the exact optimum of its objective, and nine ways of getting it wrong do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import chatrlhf.models.actor_critic as actor_critic
import chatrlhf.models.sequences as sequences
import chatrlhf.rl.experience as experience
from benchmarks.exact_optimum import BOS, MIN_GAIN, STEPS, Task, beta_of_kl, make_task, response_logprobs, run, tilted
from chatrlhf.errors import DivergedError

token_logprobs = sequences.token_logprobs
response_logprobs_of_the_package = actor_critic.response_logprobs
response_states = actor_critic.response_states
gae, token_rewards = experience.gae, experience.token_rewards


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task()


# What the judge computes.


def test_the_judge_knows_a_sequence_probability(task: Task):
    """log pi(response) by hand: one forward a prefix, the ninth embedding left out of the softmax."""
    response = [5, 0, 7, 2]
    total = 0.0
    for t, token in enumerate(response):
        logits = task.reference(input_ids=torch.tensor([[BOS, *response[:t]]])).logits[0, -1].tolist()
        total += logits[token] - math.log(sum(math.exp(logit) for logit in logits[:BOS]))
    found = response_logprobs(task.reference, torch.tensor([response]))
    assert float(found) == pytest.approx(total, abs=1e-5)
    assert float(task.ref_logprobs.exp().sum()) == pytest.approx(1.0, abs=1e-12)


def test_rewards_are_ranks_of_all_responses(task: Task):
    assert sorted(task.rewards.tolist()) == [rank / 4095 for rank in range(4096)]
    assert task.reward(["", ""], ["aaaa", "hhhh"]) == [float(task.rewards[0]), float(task.rewards[-1])]


def test_the_optimum_by_hand():
    """Two responses of pi_ref = (3/4, 1/4), R = (0, 1), beta = 1 / log 3: exp(R / beta) = (1, 3).

    The tilted weights are 3/4 and 3/4, so pi* = (1/2, 1/2) and Z = 3/2.
    """
    task = Task(torch.empty(0), torch.tensor([0.0, 1.0]).double(), None, torch.tensor([0.75, 0.25]).double().log(), {})
    beta = 1 / math.log(3)
    reward, kl, optimum = tilted(task, beta)
    assert reward == pytest.approx(0.5)
    assert kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert optimum == pytest.approx(math.log(1.5) / math.log(3))
    assert beta_of_kl(task, kl) == pytest.approx(beta)


# What PPO reaches.


@pytest.mark.slow
def test_half_the_episodes_come_close_to_the_optimum(task: Task):
    assert run(task, beta=0.3, seed=0, steps=STEPS // 2).failures(0.3) == []


@pytest.mark.slow
# One seed of one KL coefficient before each change; the others nightly, and where the maths is touched.
@pytest.mark.parametrize(
    "beta, seed",
    [
        pytest.param(beta, seed, marks=[pytest.mark.nightly] if seed or beta != 0.3 else [])
        for beta, seed in itertools.product(MIN_GAIN, range(5))
    ],
)
def test_every_seed_reaches_the_optimum(task: Task, beta: float, seed: int):
    assert run(task, beta, seed).failures(beta) == []


# What must not reach it. Each mutant replaces a function in the module that looks it up, as a wrong line would.


def greedy_logprobs(logits: Tensor, ids: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
    return token_logprobs(logits, logits.argmax(dim=-1), *args, **kwargs)


def shifted_logprobs(*args, **kwargs) -> tuple[Tensor, Tensor | None]:
    logprobs, entropy = response_logprobs_of_the_package(*args, **kwargs)
    return logprobs.roll(-1, dims=1), entropy


def logits_one_late(model, of, states=None) -> Tensor:
    """The logits that have seen the token they score."""
    logits = model(input_ids=of.input_ids, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1])[of.slots + 1]


def states_one_late(backbone, of) -> Tensor:
    """Values after each token instead of before it."""
    states = backbone(input_ids=of.input_ids, use_cache=False).last_hidden_state
    return states.reshape(-1, states.shape[-1])[of.slots + 1]


def kl_coefficient_times(factor: float) -> Callable[..., Tensor]:
    def mutant(scores, logprobs, ref_logprobs, mask, kl_coef):
        return token_rewards(scores, logprobs, ref_logprobs, mask, factor * kl_coef)

    return mutant


def score_first(scores, logprobs, ref_logprobs, mask, kl_coef) -> Tensor:
    rewards = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    rewards[:, 0] += scores
    return rewards


def no_bootstrap(rewards, values, mask, gamma, lam) -> tuple[Tensor, Tensor]:
    """delta_t = r_t - V_t: GAE with a zero critic and V taken out of the rewards."""
    advantages, _ = gae(rewards - values, torch.zeros_like(values), mask, gamma, lam)
    return advantages, advantages + values


def rewards_as_returns(rewards, values, mask, gamma, lam) -> tuple[Tensor, Tensor]:
    return gae(rewards, values, mask, gamma, lam)[0], rewards


MUTANTS = {
    "the most likely token's log-probability": (sequences, "token_logprobs", greedy_logprobs),
    "KL sign flipped": (experience, "token_rewards", kl_coefficient_times(-1.0)),
    "KL halved": (experience, "token_rewards", kl_coefficient_times(0.5)),
    "score on the first token": (experience, "token_rewards", score_first),
    "log-probabilities shifted by one": (actor_critic, "response_logprobs", shifted_logprobs),
    "logits read one position late": (actor_critic, "response_logits", logits_one_late),
    "values shifted by one": (actor_critic, "response_states", states_one_late),
    "no bootstrap": (experience, "gae", no_bootstrap),
    "returns replaced by rewards": (experience, "gae", rewards_as_returns),
}


IN_CI = ("returns replaced by rewards",)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in IN_CI else pytest.param(name, marks=pytest.mark.nightly) for name in MUTANTS]
)
def test_mutants_miss_a_criterion(task: Task, monkeypatch: pytest.MonkeyPatch, name: str):
    module, attribute, mutant = MUTANTS[name]
    monkeypatch.setattr(module, attribute, mutant)
    try:
        failures = run(task, beta=0.3, seed=0).failures(0.3)
    except DivergedError as error:
        failures = [str(error)]
    print(f"{name}: {'; '.join(failures)}")
    assert failures
