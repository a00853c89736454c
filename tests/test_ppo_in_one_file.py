"""The listing of docs/ppo_in_one_file.md runs, learns, and computes what the package computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, PAD, engine, llama, prompts

from chatrlhf.functional import advantages, kl, losses, masked, rewards
from chatrlhf.functional.logprobs import SamplingDistribution, selected_logprobs, token_logprobs

PAGE = Path(__file__).parents[1] / "docs" / "ppo_in_one_file.md"


@pytest.fixture(scope="module")
def listing() -> SimpleNamespace:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {"__name__": "ppo_in_one_file"}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
    return SimpleNamespace(**names)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def batch(seed: int) -> SimpleNamespace:
    """Six rows of one to seven tokens. What is masked holds numbers that would show in any result."""
    drawn = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=drawn)
    of = {name: torch.randn(6, 7, generator=drawn) for name in ("new", "old", "ref", "values", "returns", "adv")}
    of = {name: torch.where(mask, numbers, 1e4) for name, numbers in of.items()}
    return SimpleNamespace(mask=mask, scores=torch.randn(6, generator=drawn), **of)


@pytest.mark.parametrize("seed", range(3))
def test_its_functions_are_the_packages(listing, seed):
    x = batch(seed)
    close(listing.kl_k1(x.old, x.ref), kl.k1(x.old, x.ref))
    got = listing.token_rewards(x.scores, x.old, x.ref, x.mask, 0.3)
    close(got, rewards.token_rewards(x.scores, x.old, x.ref, x.mask, 0.3))
    for mine, theirs in zip(
        listing.gae(got, x.values, x.mask, 0.9, 0.8), advantages.gae(got, x.values, x.mask, 0.9, 0.8), strict=True
    ):
        close(mine, theirs)
    close(listing.whiten(x.adv, x.mask), masked.whiten(x.adv, x.mask))
    close(listing.masked_mean(x.adv, x.mask), masked.masked_mean(x.adv, x.mask))


@pytest.mark.parametrize("seed", range(3))
def test_its_losses_and_their_gradients_are_the_packages(listing, seed):
    x = batch(seed)
    weights = losses.token_weights(x.mask, "token_mean")
    found = []
    for terms in (listing, losses):
        new, values = x.new.clamp(max=3).requires_grad_(), x.values.clamp(max=3).requires_grad_()
        policy = terms.policy_loss(new, x.old.clamp(max=3), x.adv.clamp(max=3), 0.2)
        value = terms.value_loss(values, x.old.clamp(max=3), x.returns.clamp(max=3), 0.2)
        if terms is listing:
            total = listing.masked_mean(policy, x.mask) + listing.masked_mean(value, x.mask)
        else:
            total = (weights * policy).sum() + (weights * value).sum()
        total.backward()
        found.append((policy, value, total, new.grad, values.grad))
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_its_log_probabilities_are_the_packages(listing, temperature):
    """Those of the sampler, and those of the package's formula over the same logits."""
    model, settings = llama().eval(), listing.Settings(eos=EOS, pad=PAD, temperature=temperature)
    distribution = SamplingDistribution(temperature, (EOS,), (PAD,))
    sampled = engine(model, distribution).generate(prompts([3, 5, 4, 1]), seed=0)
    ids = torch.cat([sampled.prompts.input_ids, sampled.response_ids], dim=1)
    mask, real = torch.cat([sampled.prompts.attention_mask, sampled.response_mask], dim=1), sampled.response_mask
    length = sampled.prompts.input_ids.shape[1]
    with torch.no_grad():
        got, _ = listing.response_logprobs(model, ids, mask, length, settings)
        logits = listing.forward(model, ids, mask)[0][:, length - 1 : -1][real]
    position = torch.arange(real.shape[1]).expand_as(real)[real]
    want, _ = token_logprobs(logits, sampled.response_ids[real], position, torch.zeros_like(position), distribution)
    close(got[real], want)
    close(got[real], selected_logprobs(listing.sampled_logits(logits, settings), sampled.response_ids[real]))
    torch.testing.assert_close(got[real], sampled.sampling_logprobs[real], rtol=0, atol=1e-5)


def test_its_rollouts_keep_the_alignment_law(listing):
    """Masks are prefixes of ones, EOS is the last real token, padding is never sampled."""
    asked = prompts([3, 5, 4, 1] * 8)
    settings = listing.Settings(eos=EOS, pad=PAD, max_new_tokens=12)
    torch.manual_seed(0)
    ids, mask, real = listing.rollout(llama().eval(), asked.input_ids, asked.attention_mask, settings)
    replies = ids[:, asked.input_ids.shape[1] :]
    assert torch.equal(mask[:, asked.input_ids.shape[1] :], real)
    assert (real[:, 1:] <= real[:, :-1]).all() and real[:, 0].all()
    assert not (replies[real] == PAD).any() and (replies[~real] == PAD).all()
    ends = replies.gather(1, real.sum(dim=1, keepdim=True) - 1).squeeze(1) == EOS
    assert 0 < ends.sum() < len(ends)
    assert torch.equal(ends | real.all(dim=1), torch.ones_like(ends)) and ((replies == EOS) & real).sum() == ends.sum()


def test_it_learns(one_thread, listing):
    """From a policy that says anything to one that says what is asked."""
    means = listing.demo(steps=8)
    assert means[0] < 0.5 and means[-1] > 0.75


def test_it_does_not_learn_without_a_learning_rate(one_thread, listing):
    means = listing.demo(steps=4, lr=0.0, epochs=1)
    assert max(means) < 0.5
