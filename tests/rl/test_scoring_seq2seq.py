"""An encoder–decoder's rollouts scored and learned from: ratio 1, KL 0, and gradients that no microbatch changes."""

import copy

import pytest
import torch
from tiny import (
    ENCODER_DECODERS,
    EOS,
    PAD,
    assert_same_gradients,
    engine,
    gradients,
    prompts,
    updater,
)

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.types import Experience, ScoredRollout

ODD = SamplingDistribution(temperature=0.8, eos_token_ids=(EOS, 2, 3, 4), forbidden_ids=(PAD, 9))
CPU = torch.device("cpu")
CASES = [("ppo", "separate"), ("ppo", "shared"), ("rloo", "none"), ("grpo", "none")]


def actor_critic(family: str, kind: str) -> ActorCritic:
    policy = ENCODER_DECODERS[family]()
    if kind == "separate":
        return SeparateCritic(policy, copy.deepcopy(backbone_of(policy)), ScalarHead(16), ODD)
    return SharedTrunk(policy, ScalarHead(16), ODD) if kind == "shared" else PolicyOnly(policy, ODD)


def scored(made: ActorCritic, precision: str = "fp32", at_once: int = 64) -> ScoredRollout:
    reference = made.reference()
    prepare_models([], [*made.backbones(), reference.model], precision, CPU)
    rollout = engine(made.policy, ODD, min_new_tokens=2).generate(prompts([3, 1, 6, 4], samples=2), seed=4)
    reward = FunctionReward(lambda _, replies: [len(reply) + 0.1 * reply.count("k") for reply in replies], "letters")
    return Scorer(made, reference, reward, RewardScaling(), CPU, at_once).score(rollout)


def experience(made: ActorCritic, algorithm: str, precision: str = "fp32") -> Experience:
    return make_experience(scored(made, precision), ALGORITHMS[algorithm], Estimation(0.1, 1.0, 0.95, True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_fresh_policy_is_its_reference_and_its_own_sampler(family, precision):
    found = scored(actor_critic(family, "shared"), precision)
    assert abs(found.kl_to_reference) < 1e-5
    torch.testing.assert_close(found.old_logprobs, found.ref_logprobs, rtol=0, atol=1e-5)
    sampled, real = found.rollout.sampling_logprobs, found.rollout.response_mask
    rounding = 1e-5 if precision == "fp32" else 0.15
    torch.testing.assert_close(found.old_logprobs, sampled, rtol=0, atol=rounding)
    for values in (found.old_logprobs, found.ref_logprobs, found.values):
        assert (values[~real] == 0).all() and (values[real] != 0).all()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_rows_are_scored_alike_in_chunks_of_any_size(family):
    whole, parts = (scored(actor_critic(family, "separate"), at_once=each) for each in (64, 3))
    for name in ("old_logprobs", "ref_logprobs", "values"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=0, atol=1e-5)


@pytest.mark.parametrize("algorithm, kind", CASES)
@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
def test_microbatches_do_not_change_the_gradient_and_the_first_ratio_is_1(family, algorithm, kind):
    made = actor_critic(family, kind)
    batch = experience(made, algorithm)
    found = []
    for rows in (8, 1):
        learner = updater(made, algorithm, micro_batch_size=rows)
        stats = learner.backward(batch, kl_coef=0.1)
        assert stats["ppo/ratio_error"] < 1e-5
        found.append({name: each for name, each in gradients(made).items() if "k_proj.bias" not in name})
    assert_same_gradients(found[1], found[0], tolerance=1e-4)
    # All of it is trained: what reads the prompt, what gives the reply, and what looks from one to the other.
    own = {name for name, each in found[0].items() if each.any()}
    assert any("encoder." in name for name in own) and any("decoder." in name for name in own)
    assert any("EncDecAttention" in name or "encoder_attn" in name for name in own)
    assert ("value_head.out.weight" in own) == (kind != "none")


def test_a_step_moves_a_policy_in_bfloat16_and_its_critic():
    made = actor_critic("flan_t5", "separate")
    batch = experience(made, "ppo", "bf16")
    masters = prepare_models(made.backbones(), [], "bf16", CPU)
    before = made.evaluate(made.sequences(*parts(batch)))
    updater(made, lr=0.5, masters=masters).update(batch, 0.1, torch.Generator())
    after = made.evaluate(made.sequences(*parts(batch)))
    assert {each.dtype for each in made.policy.parameters()} == {torch.bfloat16}
    assert (after.logprobs - before.logprobs).abs().max() > 0.05 and (after.values - before.values).abs().max() > 0.05


def parts(batch: Experience) -> tuple[torch.Tensor, ...]:
    return batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.response_mask, batch.min_new_tokens
