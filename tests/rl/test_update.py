"""The update: its gradient against a float64 twin, however the minibatch is cut, and which way each term pulls."""

import copy
import functools

import pytest
import torch
import twin
from tiny import (
    EOS,
    FAMILIES,
    PAD,
    PLAIN,
    assert_same_gradients,
    engine,
    gpt2,
    gradients,
    llama,
    prompts,
    ragged_mask,
    rollout,
    updater,
)
from transformers import LlamaConfig, LlamaForCausalLM

from chatrlhf.functional.kl import k3
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import join
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.master_weights import MasterWeights, to_bfloat16
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.update import Updater
from chatrlhf.runtime import fault_points
from chatrlhf.types import Experience

ODD = SamplingDistribution(temperature=0.8, eos_token_ids=(EOS,), forbidden_ids=(PAD,))
LENGTHS = [5, 2, 7, 1, 3, 6, 4, 2]


def actor_critic(kind: str, distribution: SamplingDistribution = ODD) -> ActorCritic:
    policy = llama()
    torch.manual_seed(5)
    if kind == "separate":
        return SeparateCritic(policy, llama(seed=2).base_model, ScalarHead(16), distribution)
    if kind == "shared":
        return SharedTrunk(policy, ScalarHead(16), distribution)
    return PolicyOnly(policy, distribution)


@torch.no_grad()
def evaluate(made: ActorCritic, experience: Experience):
    e = experience
    sequences = join(e.prompt_ids, e.prompt_mask, e.response_ids, e.response_mask, e.min_new_tokens)
    return made.evaluate(sequences, with_entropy=True)


def experience(made: ActorCritic, spread: float = 0.3, seed: int = 3) -> Experience:
    """Random responses whose old log-probabilities and values lie around today's: some inside the clips, some not."""
    batch = rollout(prompts([3, 1, 6, 4, 2, 5, 3, 3]), LENGTHS)
    mask = batch.response_mask
    torch.manual_seed(seed)
    noise = [torch.randn(mask.shape) for _ in range(5)]
    empty = torch.zeros(mask.shape)
    prompt = batch.prompts
    made_up = Experience(
        prompt.input_ids,
        prompt.attention_mask,
        batch.response_ids,
        mask,
        batch.min_new_tokens,
        *[empty] * 3,
        advantages=noise[0] * mask,
        returns=None,
        old_values=None,
    )
    now = evaluate(made, made_up)
    made_up.old_logprobs = (now.logprobs + spread * noise[1]) * mask
    made_up.ref_logprobs = (now.logprobs + spread * noise[2]) * mask
    if now.values is not None:
        made_up.old_values = (now.values + spread * noise[3]) * mask
        made_up.returns = (now.values + noise[4]) * mask
    return made_up


CASES = [("ppo", "separate"), ("ppo", "shared"), ("rloo", "none"), ("grpo", "none")]


# ----- the gradient of the whole loss


def twin_loss(made: ActorCritic, batch: Experience, algorithm: str, beta: float, vf: float, ent: float):
    """(loss, policy part, value part) in float64, row by row and token by token."""
    critic = getattr(made, "critic", made.policy.base_model)
    head = getattr(made, "value_head", None)

    def value_of(prefix):
        return critic(input_ids=prefix).last_hidden_state[0, -1] @ head.out.weight[0] + head.out.bias[0]

    mask, how = batch.response_mask.tolist(), ALGORITHMS[algorithm].aggregation
    policy = value = entropy = torch.zeros((), dtype=torch.float64)
    for i in range(len(batch)):
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]].tolist()
        response = batch.response_ids[i, : sum(mask[i])].tolist()
        rows = twin.row_terms(made.policy, value_of if head else None, prompt, response, 0.8, (PAD,))
        for t, (logprob, v, h) in enumerate(rows):
            old, ref, advantage = (x[i, t].item() for x in (batch.old_logprobs, batch.ref_logprobs, batch.advantages))
            term = twin.ppo_token(logprob, old, advantage, eps=0.2)
            if algorithm == "grpo":
                r = torch.exp(ref - logprob)
                term = term + beta * (r - 1 - torch.log(r))
            policy = policy + twin.weight(mask, i, how) * term
            entropy = entropy + twin.weight(mask, i, how) * h
            if head:
                term = twin.value_token(v, batch.old_values[i, t].item(), batch.returns[i, t].item(), eps=0.2)
                value = value + twin.weight(mask, i, "token_mean") * term
    return policy + vf * value - ent * entropy, policy, value


@pytest.mark.parametrize("algorithm, kind", CASES)
def test_gradient_and_loss_agree_with_the_twin(algorithm, kind):
    made = actor_critic(kind)
    batch = experience(made)
    exact = copy.deepcopy(made).double()
    loss, policy, value = twin_loss(exact, batch, algorithm, beta=0.3, vf=0.7, ent=0.05)
    loss.backward()
    update = updater(made, algorithm, vf_coef=0.7, entropy_coef=0.05, micro_batch_size=3)
    stats = update.backward(batch, kl_coef=0.3)

    assert_same_gradients(gradients(made), gradients(exact))
    assert stats["loss/policy"].item() == pytest.approx(policy.item(), rel=1e-4)
    if kind != "none":
        assert stats["loss/value"].item() == pytest.approx(value.item(), rel=1e-4)


@pytest.mark.parametrize("algorithm, kind", CASES)
def test_microbatches_do_not_change_the_gradient(algorithm, kind):
    made, results = actor_critic(kind), []
    batch = experience(made)
    for size in (8, 2, 3):
        made.zero_grad()
        update = updater(made, algorithm, micro_batch_size=size, entropy_coef=0.05)
        stats = update.backward(batch, kl_coef=0.3)
        results.append((gradients(made), stats))
    (whole, whole_stats), *cut = results
    for got, stats in cut:
        assert_same_gradients(got, whole)
        for name, value in whole_stats.items():
            assert stats[name].item() == pytest.approx(value.item(), rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_policy_and_critic_side_by_side_learn_as_one_after_the_other(precision, one_thread):
    start, found = actor_critic("separate"), []
    batch = experience(start)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        made = copy.deepcopy(start)
        masters = MasterWeights(*made.backbones()) if precision == "bf16" else None
        update = updater(made, lr=0.1, max_grad_norm=None, masters=masters, micro_batch_size=3)
        stats = update.step(batch, kl_coef=0.0)
        found.append((stats, made.state_dict()))
    (apart, weights), (together, others) = found
    assert together == pytest.approx(apart, rel=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_minibatchs_gradient_is_that_of_its_rows_one_at_a_time(family):
    made = SharedTrunk(FAMILIES[family](), ScalarHead(16), ODD)
    batch, alone = experience(made), {}
    for row, length in enumerate(LENGTHS):
        made.zero_grad()
        updater(made, entropy_coef=0.05).backward(batch.select(torch.tensor([row])), kl_coef=0.0)
        # Alone a row's tokens weigh 1 / length each, and in the minibatch one of all its tokens.
        for name, gradient in gradients(made).items():
            alone[name] = alone.get(name, 0.0) + length / sum(LENGTHS) * gradient.double()
    for size in (8, 3):
        made.zero_grad()
        updater(made, entropy_coef=0.05, micro_batch_size=size).backward(batch, kl_coef=0.0)
        cut = gradients(made)
        if family == "opt":
            # The same number added to a row of scores leaves its softmax as it is: this gradient is 0, plus rounding.
            for name in [name for name in cut if name.endswith("k_proj.bias")]:
                assert cut.pop(name).abs().max() < 1e-5
                alone.pop(name, None)
        assert_same_gradients(cut, alone)


@pytest.mark.parametrize("algorithm, kind", CASES)
def test_a_step_in_microbatches_is_a_step_in_one(algorithm, kind):
    start, after = actor_critic(kind), []
    batch = experience(start)
    for size in (8, 2):
        made = copy.deepcopy(start)
        updater(made, algorithm, lr=0.1, micro_batch_size=size, max_grad_norm=None).step(batch, kl_coef=0.3)
        after.append(made.state_dict())
    for name, weight in after[0].items():
        torch.testing.assert_close(after[1][name], weight, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(weight, start.state_dict()[name]) for name, weight in after[0].items())


def test_padding_of_the_experience_changes_nothing():
    made = actor_critic("separate")
    batch = experience(made)
    wide = Experience(
        **{
            name: torch.nn.functional.pad(value, (4, 0) if name.startswith("prompt") else (0, 4))
            if value is not None and value.dim() == 2
            else value
            for name, value in vars(batch).items()
        }
    )
    results = []
    for given in (batch, wide):
        made.zero_grad()
        updater(made).backward(given, kl_coef=0.0)
        results.append(gradients(made))
    assert_same_gradients(results[1], results[0])


# ----- which way each term pulls


def quiet(batch: Experience, **changes) -> Experience:
    """The batch without advantages, so that other terms are alone."""
    return Experience(**{**vars(batch), "advantages": torch.zeros_like(batch.advantages), **changes})


def test_the_policy_term_makes_good_tokens_likelier_and_bad_ones_rarer():
    made = actor_critic("none")
    batch = experience(made, spread=0.0)
    before = evaluate(made, batch).logprobs
    updater(made, "rloo", lr=1e-3, max_grad_norm=None).step(batch, kl_coef=0.0)
    change = evaluate(made, batch).logprobs - before
    assert (change * batch.advantages).sum() > 0


def test_the_entropy_bonus_raises_entropy():
    made = actor_critic("none", PLAIN)
    batch = quiet(experience(made))
    before = evaluate(made, batch).entropy.sum()
    updater(made, lr=1e-2, entropy_coef=1.0).step(batch, kl_coef=0.0)
    assert evaluate(made, batch).entropy.sum() > before + 0.01


def test_without_advantages_bonus_and_kl_the_policy_stays():
    made = actor_critic("none")
    updater(made, "grpo").backward(quiet(experience(made)), kl_coef=0.0)
    assert all((gradient == 0).all() for gradient in gradients(made).values())


def test_grpos_kl_term_pulls_the_policy_to_its_reference():
    made = actor_critic("none")
    batch = quiet(experience(made))

    def mean_k3() -> float:
        # Averaged over the tokens of a row, then over rows, as GRPO weighs them.
        kl = k3(evaluate(made, batch).logprobs, batch.ref_logprobs) * batch.response_mask
        return (kl.sum(1) / batch.response_mask.sum(1)).mean().item()

    before = mean_k3()
    steps = updater(made, "grpo", lr=3e-3)
    stats = steps.step(batch, kl_coef=0.5)
    # Nothing else is in the loss.
    assert stats["loss/policy"] == pytest.approx(0.5 * before, rel=1e-4)
    assert mean_k3() < 0.95 * before


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_kl_in_the_reward_is_not_in_the_loss_too(algorithm):
    made = actor_critic("none")
    updater(made, algorithm).backward(quiet(experience(made)), kl_coef=100.0)
    assert all((gradient == 0).all() for gradient in gradients(made).values())


def test_the_value_term_moves_values_towards_returns():
    made = actor_critic("separate")
    batch = quiet(experience(made, spread=0.0))

    def error() -> float:
        return ((evaluate(made, batch).values - batch.returns) ** 2 * batch.response_mask).sum().item()

    before = error()
    updater(made, lr=1e-2).step(batch, kl_coef=0.0)
    assert error() < 0.99 * before


def test_every_step_starts_from_gradient_0():
    made = actor_critic("none")
    batch, still = experience(made), updater(made, "rloo", lr=0.0)
    first, again = (still.step(batch, kl_coef=0.0)["ppo/grad_norm"] for _ in range(2))
    assert first == pytest.approx(again, rel=1e-6)


def test_every_step_is_one_step_of_the_schedule():
    made = actor_critic("none")
    update = updater(made, "rloo", lr=1.0, epochs=2, batch_size=4)
    schedule = torch.optim.lr_scheduler.LinearLR
    update.backend.scheduler = schedule(update.backend.optimizer, 1.0, end_factor=0.0, total_iters=8)
    update.update(experience(made), 0.0, torch.Generator())
    # 2 epochs of 8 / 4 minibatches: 4 of 8 steps
    assert update.backend.optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def distances(made: ActorCritic, start: ActorCritic) -> list[float]:
    """How far the policy and the critic have moved."""
    groups = zip(made.parameter_groups(0, 0), start.parameter_groups(0, 0), strict=True)
    moves = [[a - b for a, b in zip(new["params"], old["params"], strict=True)] for new, old in groups]
    return [torch.cat([move.flatten() for move in group]).norm().item() for group in moves]


def test_the_policys_step_does_not_depend_on_a_separate_critics_error():
    # Policy and critic are clipped by norms of their own.
    start, after = actor_critic("separate"), []
    batch = experience(start)
    for scale in (1.0, 100.0):
        made = copy.deepcopy(start)
        given = Experience(**{**vars(batch), "returns": batch.returns * scale})
        stats = updater(made, lr=1.0, max_grad_norm=0.01, cliprange_value=None).step(given, kl_coef=0.0)
        after.append(made.policy.state_dict())
        assert distances(made, start) == pytest.approx([0.01, 0.01], rel=1e-3)
        assert stats["ppo/grad_norm"] > 0.01  # as it was before clipping
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


# ----- rollouts of another sampler


@pytest.mark.parametrize("algorithm, kind", CASES)
@pytest.mark.parametrize("cap", [None, 1.2])
def test_each_tokens_policy_loss_is_weighed_and_nothing_else(algorithm, kind, cap):
    """Weights are positive, so a weighed token is one with another advantage; value and KL terms stay as they are."""
    made = actor_critic(kind)
    batch = experience(made)
    torch.manual_seed(7)
    batch.sampling_logprobs = batch.old_logprobs + 0.5 * torch.randn(batch.old_logprobs.shape) * batch.response_mask
    weighed = updater(made, algorithm, foreign_sampler=True, importance_cap=cap, micro_batch_size=3)
    stats = weighed.backward(batch, kl_coef=0.2)
    got, loss = gradients(made), stats["loss/policy"].item()
    made.zero_grad()
    ratios = torch.exp(batch.old_logprobs - batch.sampling_logprobs)
    batch.advantages = batch.advantages * (ratios if cap is None else ratios.clamp(max=cap))
    want = updater(made, algorithm, micro_batch_size=3).backward(batch, kl_coef=0.2)["loss/policy"].item()
    assert_same_gradients(got, gradients(made))
    assert loss == pytest.approx(want, rel=1e-5)
    if cap is None:
        assert "sampling/truncated" not in stats
    else:
        share = (ratios > cap)[batch.response_mask].float().mean()
        assert 0.2 < share < 0.6 and stats["sampling/truncated"].item() == pytest.approx(share.item(), abs=1e-6)


def test_the_own_engines_rollouts_are_not_weighed():
    made = actor_critic("none")
    batch = experience(made)
    updater(made, "rloo").backward(batch, kl_coef=0.0)
    want = gradients(made)
    made.zero_grad()
    batch.sampling_logprobs = batch.old_logprobs - 1.0 * batch.response_mask
    stats = updater(made, "rloo").backward(batch, kl_coef=0.0)
    assert_same_gradients(gradients(made), want, tolerance=0.0)
    assert "sampling/truncated" not in stats


# ----- statistics


def test_clipfrac_and_approx_kl_by_hand():
    made = actor_critic("none")
    batch = experience(made, spread=0.0)
    mask = ragged_mask(LENGTHS)
    # 30 real tokens. Rows 0 and 1 (7 tokens): ratio 1.5 with a good advantage, so clipped. The rest: ratio 1.
    batch.advantages = torch.ones(mask.shape) * mask
    batch.old_logprobs[:2] -= torch.tensor(1.5).log() * mask[:2]
    stats = updater(made, "rloo").backward(batch, kl_coef=0.0)
    assert stats["ppo/clipfrac"].item() == pytest.approx(7 / 30, rel=1e-5)
    # KL(old || new) by k3 with r = new / old = 1.5: 0.5 - log 1.5 = 0.09453 on 7 of 30 tokens
    assert stats["ppo/approx_kl"].item() == pytest.approx(0.09453 * 7 / 30, rel=1e-3)
    assert stats["ppo/ratio_error"].item() == pytest.approx(0.5 * 7 / 30, rel=1e-4)


@functools.cache
def fresh(precision: str):
    """Statistics of the first update of a policy that came with dropout, sampled and scored by itself."""
    policy = gpt2(dropout=0.1)
    reference = Reference(copy.deepcopy(policy), ODD)
    made = SharedTrunk(policy, ScalarHead(16).zero_(), ODD)
    masters = None
    if precision == "bf16":
        masters = MasterWeights(*made.backbones())
        to_bfloat16(reference.model)
    sampler = engine(policy, ODD, min_new_tokens=2)
    sampled = sampler.generate(prompts([3, 1, 6, 4] * 2), seed=0)
    reward = FunctionReward(lambda users, replies: [float(len(reply)) for reply in replies], "length")
    scored = Scorer(made, reference, reward, RewardScaling(), torch.device("cpu"), 3).score(sampled)
    given = make_experience(scored, ALGORITHMS["ppo"], Estimation(kl_coef=0.1))
    steps = updater(made, lr=1e-2, epochs=2, batch_size=4, micro_batch_size=2, masters=masters)
    return scored, steps.update(given, 0.1, torch.Generator().manual_seed(0))


def test_a_fresh_policy_has_ratio_1_and_kl_0():
    scored, stats = fresh("fp32")
    assert stats["ppo/first_ratio_error"] < 1e-5
    assert abs(scored.kl_to_reference) < 1e-5


def test_bf16_reports_how_far_the_first_ratio_is_from_1():
    _, stats = fresh("bf16")
    assert 0 <= stats["ppo/first_ratio_error"] < 0.1
    assert stats["loss/value"] > 0


def test_the_ratio_moves_once_the_policy_has():
    _, stats = fresh("fp32")
    assert stats["ppo/approx_kl"] > 1e-6


# ----- what is not finite


def state_of(update: Updater) -> dict[str, object]:
    backend = update.backend
    states = copy.deepcopy(backend.state_dict())
    return {"weights": copy.deepcopy(update.actor_critic.state_dict()), **states}


def same(first: object, second: object) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gradient_that_is_not_finite_changes_nothing(value, precision):
    made = actor_critic("separate")
    masters = None
    if precision == "bf16":
        masters = MasterWeights(*made.backbones())
    update = updater(made, lr=1e-2, epochs=1, batch_size=4, masters=masters)
    groups = [{"params": group["params"]} for group in update.backend.optimizer.param_groups]
    update.backend.optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    update.backend.scheduler = torch.optim.lr_scheduler.LinearLR(update.backend.optimizer, total_iters=20)
    data = experience(made)
    update.update(data, 0.0, torch.Generator().manual_seed(1))  # moments are there
    before = state_of(update)

    def spoil(model: ActorCritic) -> None:
        gradients = update.backend.gradients
        gradients.views[-1].view(-1)[0] = value  # the critic's, so that each norm counts

    end = fault_points.at("rl.gradients", spoil)
    try:
        assert update.update(data, 0.0, torch.Generator().manual_seed(2)) == {}
    finally:
        end()
    assert same(state_of(update), before)
    assert len(update.not_taken) == 2 and "critic's gradient" in update.not_taken[0].why
    assert sorted(row for each in update.not_taken for row in each.rows) == list(range(8))
    assert update.update(data, 0.0, torch.Generator().manual_seed(2))["loss/policy"]
    assert update.not_taken == [] and not same(state_of(update), before)


def test_one_minibatch_that_is_not_finite_leaves_the_others_as_they_are():
    """As if its row had not been there."""
    made = actor_critic("none")
    data = experience(made)
    data.advantages[3] = torch.nan
    update = updater(made, "rloo", lr=1e-2, epochs=1, batch_size=1)
    without = updater(copy.deepcopy(made), "rloo", lr=1e-2, epochs=1, batch_size=1)
    stats = update.update(data, 0.0, torch.Generator().manual_seed(4))
    assert [(each.rows, each.where) for each in update.not_taken] == [([3], "the rollout's advantages")]
    assert all(torch.tensor(value).isfinite() for value in stats.values())
    order = torch.randperm(8, generator=torch.Generator().manual_seed(4)).tolist()
    for row in order:
        if row != 3:
            without.step(data.select(torch.tensor([row])), 0.0)
    assert same(update.actor_critic.state_dict(), without.actor_critic.state_dict())


def test_the_module_is_named_that_begins_it():
    """A weight of 3e38 is finite, what is computed with it is not."""
    made = actor_critic("none")
    data = experience(made)
    with torch.no_grad():
        made.policy.model.layers[1].input_layernorm.weight.fill_(3e38)
    update = updater(made, "rloo", lr=1e-2, epochs=1, batch_size=8)
    assert update.update(data, 0.0, torch.Generator()) == {}
    assert update.not_taken[0].where == "policy.model.layers.1.input_layernorm"


def test_a_weight_that_is_not_finite_is_named():
    made = actor_critic("none")
    data = experience(made)
    with torch.no_grad():
        made.policy.lm_head.weight[3] = torch.nan
    update = updater(made, "rloo", lr=1e-2, epochs=1, batch_size=8)
    assert update.update(data, 0.0, torch.Generator()) == {}
    assert update.not_taken[0].where == "policy.lm_head.weight"


# ----- out of memory


@pytest.mark.parametrize("fit", [1, 2, 5])
def test_where_memory_is_short_smaller_microbatches_give_the_same_step(fit, monkeypatch):
    made = actor_critic("separate")
    data = experience(made)
    said: list[str] = []
    short, want = (updater(copy.deepcopy(made), lr=0.1, micro_batch_size=8) for _ in range(2))
    short.warn = said.append
    losses, sizes = Updater.losses, []

    def limited(self, sequences, micro, *rest):
        sizes.append(len(micro))
        if len(micro) > fit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return losses(self, sequences, micro, *rest)

    stats = want.step(data, 0.0)
    # Rows of one length each, so that a microbatch has as many rows as it may.
    monkeypatch.setattr(
        "chatrlhf.rl.update.cut_by_length", lambda lengths, size, _: torch.arange(len(lengths)).split(size)
    )
    monkeypatch.setattr(Updater, "losses", limited)
    assert short.step(data, 0.0) == pytest.approx(stats, rel=1e-4, abs=1e-6)
    left = 2 ** (fit.bit_length() - 1)
    assert short.settings.micro_batch_size == left and len(said) == {1: 3, 2: 2, 4: 1}[left]
    assert "out of memory" in said[0] and "with the same gradients" in said[0]
    for name, weight in want.actor_critic.state_dict().items():
        torch.testing.assert_close(short.actor_critic.state_dict()[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_that_is_too_small_the_step_is_the_same():
    """What a backward of two rows needs is all there is; it is asked for sixteen."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    made = PolicyOnly(LlamaForCausalLM(config).eval().cuda(), PLAIN)
    batch = rollout(prompts([100] * 16), [200] * 16)
    rows = Experience(
        batch.prompts.input_ids,
        batch.prompts.attention_mask,
        batch.response_ids,
        batch.response_mask,
        batch.min_new_tokens,
        *[torch.randn(batch.response_mask.shape) for _ in range(4)],
        None,
        None,
    ).to("cuda")
    short, want = (updater(copy.deepcopy(made), "rloo", lr=0.1, micro_batch_size=size) for size in (16, 2))
    said: list[str] = []
    for each in (short, want):
        each.warn, each.device = said.append, torch.device("cuda")
        each.backend.device = each.device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    stats = want.step(rows, 0.0)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.2 * torch.cuda.max_memory_reserved() / total)
    try:
        assert short.step(rows, 0.0) == pytest.approx(stats, rel=1e-3, abs=1e-5)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said and short.settings.micro_batch_size < 16


def test_where_one_row_does_not_fit_it_is_an_error(monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    made = actor_critic("none")
    update = updater(made, "rloo", micro_batch_size=2)
    update.warn = lambda _: None
    monkeypatch.setattr(Updater, "losses", never)
    with pytest.raises(torch.OutOfMemoryError):
        update.step(experience(made), 0.0)


# ----- epochs and minibatches


class Recorder(Updater):
    """Remembers the minibatches instead of learning from them."""

    def step(self, minibatch, kl_coef):
        self.__dict__.setdefault("seen", []).append(minibatch.old_logprobs[:, 0].tolist())
        return {"ppo/ratio_error": float(len(self.seen)), "n": float(len(self.seen))}


def recorded(seed: int, epochs: int = 3):
    made = actor_critic("none")
    plain = updater(made, epochs=epochs, batch_size=4)
    recorder = Recorder(**vars(plain))
    stats = recorder.update(experience(made), 0.0, torch.Generator().manual_seed(seed))
    return recorder.seen, stats


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own():
    seen, _ = recorded(seed=0)
    epochs = [seen[i] + seen[i + 1] for i in (0, 2, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len(set(epochs[0])) == 8
    assert epochs[0] != epochs[1] != epochs[2]


def test_minibatches_are_a_function_of_the_generator():
    assert recorded(seed=0) == recorded(seed=0) != recorded(seed=1)


def test_statistics_are_means_over_minibatches_and_the_ratio_error_the_firsts():
    _, stats = recorded(seed=0)
    assert stats == {"n": 3.5, "ppo/ratio_error": 3.5, "ppo/first_ratio_error": 1.0}  # 3.5 = (1 + ... + 6) / 6
