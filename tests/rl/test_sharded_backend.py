"""The update over engines, with an engine that deals nothing out: where weights go, and what is asked of engines."""

from __future__ import annotations

import pytest
import ranks
import torch
from tiny import llama

from chatrlhf.models.actor_critic import SeparateCritic
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.weight_sharing import copy_sharing_frozen
from chatrlhf.rl.sharded_backend import EngineBackend, shard_actor_critic
from chatrlhf.rl.update import Updater
from chatrlhf.sharding.engine import Root

CPU = torch.device("cpu")


class Engine:
    """Gradient descent on the modules' own weights."""

    def __init__(self, modules, groups, clip) -> None:
        self.model, self.max_norm, self.lasts = Root(modules), clip or float("inf"), []
        self.optimizer = torch.optim.SGD(groups, momentum=0.9)

    def __call__(self, work):
        return self.model(work)

    def backward(self, loss, last):
        self.lasts.append(last)
        loss.backward()

    def clip(self):
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm))

    def step(self):
        self.optimizer.step()
        self.skip()

    def skip(self):
        self.optimizer.zero_grad()


class Dealer:
    def __init__(self, with_weights, clip) -> None:
        self.with_weights, self.clip, self.dealt = with_weights, clip, None

    def __call__(self, made, reference, groups, dtype, *rest):
        def engine(modules, share):
            return Engine(modules, share, self.clip)

        self.dealt = dealt = shard_actor_critic(
            made, [reference.model], lambda _: None, engine, groups, self.with_weights, dtype, CPU, keep_frozen=True
        )
        constant = [torch.optim.lr_scheduler.ConstantLR(each.optimizer, factor=1.0) for each in dealt.engines]
        return Updater(dealt.trained, *rest, EngineBackend(dealt, constant, CPU))


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize("case, clip", [("separate critic", 1.0), ("shared trunk", None), ("frozen trunk", None)])
def test_it_is_the_plain_update(one_thread, case, clip, with_weights):
    dealer = Dealer(with_weights, clip)
    got, want = (ranks.ppo_steps(*ranks.CASES[case], clip=clip, deal=deal) for deal in (dealer, None))
    start = ranks.actor_critic(ranks.CASES[case][0]).state_dict()
    for name, weight in want["weights"].items():
        assert (got["weights"][name] - weight).abs().max() <= 1e-4 * (weight - start[name]).abs().max(), name
    # Each part of its own has an engine; steps are taken at the last backward of a minibatch alone.
    engines = dealer.dealt.engines
    assert len(engines) == (2 if case == "separate critic" else 1)
    assert all(engine.lasts[-1] and engine.lasts.count(True) == 2 * 2 * 3 < len(engine.lasts) for engine in engines)


def test_weights_are_there_for_a_rollout_and_gone_for_the_update(one_thread):
    dealer = Dealer(True, 1.0)
    ranks.ppo_steps(*ranks.CASES["frozen trunk"], deal=dealer)
    whole, trained = dealer.dealt.whole, dict(dealer.dealt.trained.named_parameters())
    sizes = {each.requires_grad: each.numel() for each in whole.parameters()}
    assert sizes[True] == 0 < sizes[False]
    with dealer.dealt.gathered_params(CPU):
        assert all(torch.equal(each, trained[name]) for name, each in whole.named_parameters())
    assert all(each.numel() == 0 for each in whole.parameters() if each.requires_grad)


@pytest.mark.parametrize("with_weights, engines", [(False, 2), (True, 1)])
def test_a_weight_in_two_parts_is_dealt_out_once(with_weights, engines):
    policy = llama()
    policy.model.embed_tokens.requires_grad_(False)
    made = SeparateCritic(policy, copy_sharing_frozen(policy).base_model, ScalarHead(16), ranks.DISTRIBUTION)
    dealer = Dealer(with_weights, None)
    dealer(made, made.reference(), made.parameter_groups(0.1, 0.1), torch.float32, *[None] * 3)
    assert len(dealer.dealt.engines) == engines
