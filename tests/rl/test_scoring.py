"""A rollout scored: a fresh policy is its reference, and padding has no say in anything."""

import copy

import pytest
import torch
import twin
from tiny import EOS, FAMILIES, PAD, PLAIN, engine, gpt2, llama, prompts, widened

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.types import Rollout, ScoredRollout

ENDS = (EOS, 2, 3, 4, 5)
ODD = SamplingDistribution(temperature=0.8, eos_token_ids=ENDS, forbidden_ids=(PAD, 9))
SHAPE = [3, 1, 6, 4]


def letters(users: list[str], replies: list[str]) -> list[float]:
    """A reward that looks at both texts."""
    return [len(b) + 0.1 * b.count("k") - 0.01 * len(a) for a, b in zip(users, replies, strict=True)]


def scorer(policy, reference=None, distribution=ODD, kind=SeparateCritic, **options) -> Scorer:
    reference = Reference(copy.deepcopy(reference or policy), distribution)
    if kind is SeparateCritic:
        actor_critic = SeparateCritic(policy, copy.deepcopy(policy.base_model), ScalarHead(16), distribution)
    elif kind is SharedTrunk:
        actor_critic = SharedTrunk(policy, ScalarHead(16), distribution)
    else:
        actor_critic = PolicyOnly(policy, distribution)
    reward = FunctionReward(letters, "letters")
    return Scorer(actor_critic, reference, reward, RewardScaling(), torch.device("cpu"), **options)


def sampled(policy, batch=None, pad: int = PAD, **limits) -> Rollout:
    limits = dict(min_new_tokens=2) | limits
    return engine(policy, ODD, pad=pad, **limits).generate(batch or prompts(SHAPE), seed=4)


def assert_same(got: ScoredRollout, want: ScoredRollout, order=slice(None)) -> None:
    for name in ("scores", "old_logprobs", "ref_logprobs", "values"):
        theirs = getattr(want, name)[order]
        torch.testing.assert_close(getattr(got, name), theirs, rtol=0, atol=1e-5, msg=name)
    assert got.entropy == pytest.approx(want.entropy, abs=1e-5)
    assert got.kl_to_reference == pytest.approx(want.kl_to_reference, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fresh_policy_is_its_reference_and_its_own_sampler(family):
    policy = FAMILIES[family]()  # GPT-2 comes with dropout and in training mode
    judge = scorer(policy)
    scored = judge.score(sampled(policy))
    assert abs(scored.kl_to_reference) < 1e-5
    torch.testing.assert_close(scored.old_logprobs, scored.ref_logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.old_logprobs, scored.rollout.sampling_logprobs, rtol=0, atol=1e-5)


def test_another_reference_gives_a_kl():
    policy = llama()
    scored = scorer(policy, reference=llama(seed=1)).score(sampled(policy))
    assert scored.kl_to_reference > 0.1


def test_the_mean_kl_of_many_samples_is_the_kl():
    # One token a response, so the KL can be enumerated over the vocabulary.
    policy, other = llama(), llama(seed=1)
    batch = prompts([3], samples=4000)
    plain = engine(policy, PLAIN, max_new_tokens=1).generate(batch, seed=0)
    scored = scorer(policy, reference=other, distribution=PLAIN).score(plain)
    with torch.no_grad():
        p, q = (model(batch.input_ids[:1]).logits[0, -1].softmax(-1).tolist() for model in (policy, other))
    # The standard error of 4,000 samples is 0.02.
    assert scored.kl_to_reference == pytest.approx(twin.kl(p, q), abs=0.06)


@pytest.mark.parametrize("kind", [SeparateCritic, SharedTrunk])
def test_left_padding_changes_nothing(kind):
    policy = llama()
    judge = scorer(policy, llama(1), kind=kind)
    narrow, wide = (sampled(policy, batch) for batch in (prompts(SHAPE), widened(prompts(SHAPE), 6)))
    assert_same(judge.score(wide), judge.score(narrow))


def test_rows_do_not_depend_on_their_order():
    policy = llama()
    judge, batch = scorer(policy, llama(1)), sampled(policy)
    order = torch.tensor([2, 0, 3, 1])
    moved = Rollout(
        batch.prompts.select(order),
        batch.response_ids[order],
        batch.response_mask[order],
        batch.sampling_logprobs[order],
        batch.finished[order],
        batch.min_new_tokens[order],
        [batch.completions[i] for i in order],
    )
    assert_same(judge.score(moved), judge.score(batch), order)


def test_pad_may_be_eos():
    policy = llama()
    judge = scorer(policy, llama(1))
    apart = sampled(policy, prompts(SHAPE, pad=PAD), pad=PAD)
    same = sampled(policy, prompts(SHAPE, pad=EOS), pad=EOS)
    assert not torch.equal(apart.response_ids, same.response_ids)
    assert_same(judge.score(same), judge.score(apart))


def test_rows_are_scored_alike_in_chunks_of_any_size():
    policy = llama()
    judge, batch = scorer(policy, llama(1)), sampled(policy)
    want = judge.score(batch)
    judge.micro_batch_size = 3
    assert_same(judge.score(batch), want)


def test_scores_are_the_rewards_shaped():
    policy, batch = llama(), sampled(llama(), max_new_tokens=4)
    judge = scorer(policy)
    judge.scaling = RewardScaling(cliprange=2.5, missing_eos_penalty=1.0)
    scored = judge.score(batch)
    raw = letters(batch.prompts.texts, batch.completions)
    assert scored.raw_scores.tolist() == pytest.approx(raw)
    assert 0 < batch.finished.sum() < 4
    expected = [min(r, 2.5) - (not done) for r, done in zip(raw, batch.finished.tolist(), strict=True)]
    assert scored.scores.tolist() == pytest.approx(expected)


def test_without_a_critic_there_are_no_values():
    policy = llama()
    assert scorer(policy, kind=PolicyOnly).score(sampled(policy)).values is None


def test_padding_is_0_everywhere():
    policy = llama()
    scored = scorer(policy, llama(1)).score(sampled(policy))
    padding = ~scored.rollout.response_mask
    assert padding.any()
    for values in (scored.old_logprobs, scored.ref_logprobs, scored.values):
        assert (values[padding] == 0).all() and (values[~padding] != 0).all()


def test_entropy_is_a_mean_over_real_tokens():
    # All logits equal: log of the number of allowed tokens, wherever they stand.
    policy = llama()
    torch.nn.init.zeros_(policy.lm_head.weight)
    distribution = SamplingDistribution(forbidden_ids=(PAD, 9))
    batch = engine(policy, distribution).generate(prompts(SHAPE), seed=0)
    batch.response_mask[1, 3:] = False
    scored = scorer(policy, distribution=distribution).score(batch)
    assert scored.entropy == pytest.approx(torch.tensor(22.0).log().item(), abs=1e-5)


def test_scoring_leaves_no_graph_behind():
    policy = gpt2()
    scored = scorer(policy).score(sampled(policy))
    assert not scored.old_logprobs.requires_grad and not scored.values.requires_grad


def test_where_memory_is_short_fewer_rows_are_read_at_once(monkeypatch):
    policy = llama()
    rollout = sampled(policy)
    judge = scorer(policy, micro_batch_size=2)
    want, judge.micro_batch_size = judge.score(rollout), 8
    evaluate = type(judge.actor_critic).evaluate

    def limited(self, sequences, *args, **kwargs):
        if len(sequences.input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return evaluate(self, sequences, *args, **kwargs)

    monkeypatch.setattr(type(judge.actor_critic), "evaluate", limited)
    assert_same(judge.score(rollout), want)
    assert judge.micro_batch_size == 2
