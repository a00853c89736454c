"""The listing of docs/ppo_in_one_file.md runs, learns, and computes what the package computes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS, PAD, PLAIN, engine, llama, prompts

from chatrlhf.functional import advantages, kl, losses, masked, rewards
from chatrlhf.models.actor_critic import PolicyOnly

PAGE = Path(__file__).parents[1] / "docs" / "ppo_in_one_file.md"


@pytest.fixture(scope="module")
def listing() -> SimpleNamespace:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(compile(code, str(PAGE), "exec"), names)
    return SimpleNamespace(**names)


def batch(seed: int) -> SimpleNamespace:
    drawn = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (6, 1), generator=drawn)
    of = {name: torch.randn(6, 7, generator=drawn) for name in ("new", "old", "ref", "values", "returns", "adv")}
    return SimpleNamespace(mask=mask, scores=torch.randn(6, generator=drawn), **of)


@pytest.mark.parametrize("seed", range(3))
def test_its_functions_are_the_packages(listing, seed):
    x = batch(seed)
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # noqa: E731
    close(listing.kl_k1(x.old, x.ref), kl.k1(x.old, x.ref))
    got = listing.token_rewards(x.scores, x.old, x.ref, x.mask, 0.3)
    close(got, rewards.token_rewards(x.scores, x.old, x.ref, x.mask, 0.3))
    for mine, theirs in zip(
        listing.gae(got, x.values, x.mask, 0.9, 0.8), advantages.gae(got, x.values, x.mask, 0.9, 0.8), strict=True
    ):
        close(mine, theirs)
    close(listing.whiten(x.adv, x.mask), masked.whiten(x.adv, x.mask))
    close(listing.masked_mean(x.adv, x.mask), masked.masked_mean(x.adv, x.mask))
    close(listing.policy_loss(x.new, x.old, x.adv, 0.2), losses.policy_loss(x.new, x.old, x.adv, 0.2))
    mine = listing.value_loss(x.values, x.old, x.returns, 0.2)
    close(mine, losses.value_loss(x.values, x.old, x.returns, 0.2))


def test_its_log_probabilities_are_the_packages(listing):
    model = llama().eval()
    sampled = engine(model, PLAIN).generate(prompts([3, 5, 4, 1]), seed=0)
    ids = torch.cat([sampled.prompts.input_ids, sampled.response_ids], dim=1)
    mask = torch.cat([sampled.prompts.attention_mask, sampled.response_mask], dim=1)
    made, real = PolicyOnly(model, PLAIN), sampled.response_mask
    of = sampled.prompts
    sequences = made.sequences(
        of.input_ids, of.attention_mask, sampled.response_ids, real, sampled.min_new_tokens, None
    )
    with torch.no_grad():
        got, _ = listing.token_logprobs(model, ids, mask, of.input_ids.shape[1])
        want = made.evaluate(sequences).logprobs
    torch.testing.assert_close(got[real], want[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[real], sampled.sampling_logprobs[real], rtol=0, atol=1e-5)


def test_it_learns(listing):
    """To answer with ten of the 24 tokens, from a policy that says anything; with a learning rate of 0 it does not."""
    asked = torch.randint(6, 12, (64, 4))
    share = lambda ids, mask: ((ids >= 5) & (ids < 15) & mask).sum(dim=1) / mask.sum(dim=1)  # noqa: E731
    settings = dict(steps=10, eos=EOS, pad=PAD, minibatch=32, kl_coef=0.01)
    means = listing.train(llama(), asked, torch.ones(64, 4, dtype=torch.bool), share, lr=1e-2, **settings)
    assert means[0] < 0.5 and means[-1] > 0.9
    idle = listing.train(llama(), asked, torch.ones(64, 4, dtype=torch.bool), share, lr=0.0, **settings)
    assert max(idle) < 0.5
