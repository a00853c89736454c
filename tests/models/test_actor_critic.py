"""Where log-probabilities, values and the reference come from, and that padding has no say in them."""

import copy

import pytest
import torch
from tiny import (
    EOS,
    FAMILIES,
    PLAIN,
    assert_same_gradients,
    gemma2,
    gpt2,
    gradients,
    llama,
    prompts,
    rollout,
    widened,
)

from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, join
from chatrlhf.types import Rollout


def joined(batch: Rollout) -> Sequences:
    return join(batch.prompts.input_ids, batch.prompts.attention_mask, batch.response_ids, batch.response_mask)


def alone(policy) -> ActorCritic:
    return PolicyOnly(policy, PLAIN)


def separate(policy) -> SeparateCritic:
    return SeparateCritic(policy, copy.deepcopy(policy.base_model), ScalarHead(16), PLAIN)


def shared(policy) -> SharedTrunk:
    return SharedTrunk(policy, ScalarHead(16), PLAIN)


BATCH = rollout(prompts([3, 1, 6]), [5, 2, 4])


@pytest.mark.parametrize("make", [separate, shared])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_value_is_read_at_the_slot_before_its_token(make, family):
    actor_critic = make(FAMILIES[family]())
    values = actor_critic.evaluate(joined(BATCH)).values
    backbone = actor_critic.critic if make is separate else actor_critic.policy.base_model
    for i, length in enumerate(BATCH.lengths.tolist()):
        ids = BATCH.prompts.input_ids[i][BATCH.prompts.attention_mask[i]].tolist()
        for t in range(length):
            # Run on the prompt and the tokens *before* t alone; the last state of that is what V may know.
            prefix = torch.tensor([ids + BATCH.response_ids[i, :t].tolist()])
            states = backbone(input_ids=prefix).last_hidden_state
            torch.testing.assert_close(values[i, t], actor_critic.value_head(states[0, -1]), rtol=0, atol=1e-5)
    assert (values[~BATCH.response_mask] == 0).all()


@pytest.mark.parametrize("make", [separate, shared])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_and_values_do_not_depend_on_padding_or_batch_order(make, family):
    actor_critic = make(FAMILIES[family]())
    order = torch.tensor([2, 0, 1])
    moved = Rollout(
        widened(BATCH.prompts, 5).select(order),
        *(getattr(BATCH, name)[order] for name in ("response_ids", "response_mask", "sampling_logprobs")),
        BATCH.finished,
        BATCH.min_new_tokens,
        BATCH.completions,
    )
    with torch.no_grad():
        want, got = actor_critic.evaluate(joined(BATCH)), actor_critic.evaluate(joined(moved))
    torch.testing.assert_close(got.logprobs, want.logprobs[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.values, want.values[order], rtol=0, atol=1e-5)


def test_shared_and_separate_agree_on_the_policy():
    policy = llama()
    without, with_head = alone(policy).evaluate(joined(BATCH)), shared(policy).evaluate(joined(BATCH))
    torch.testing.assert_close(without.logprobs, with_head.logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("make", [alone, separate, shared])
def test_dropout_is_off_in_every_part(make):
    actor_critic = make(gpt2(dropout=0.5))
    assert not any(module.training for module in actor_critic.modules())
    first, second = actor_critic.evaluate(joined(BATCH)), actor_critic.evaluate(joined(BATCH))
    assert torch.equal(first.logprobs, second.logprobs)
    assert make is alone or torch.equal(first.values, second.values)


def test_the_reference_has_dropout_off_too():
    reference = Reference(gpt2(dropout=0.5), PLAIN)
    assert torch.equal(reference.logprobs(joined(BATCH)), reference.logprobs(joined(BATCH)))


def test_the_reference_equals_a_policy_of_the_same_weights_and_gets_no_gradient():
    policy = llama()
    reference = Reference(copy.deepcopy(policy), PLAIN)
    logprobs = reference.logprobs(joined(BATCH))
    expected = alone(policy).evaluate(joined(BATCH)).logprobs
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)
    assert not logprobs.requires_grad
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


@pytest.mark.parametrize("make", [separate, shared])
@pytest.mark.parametrize("unfrozen", [None, 1])
def test_a_critic_is_apart_where_no_weight_gets_both_gradients(make, unfrozen):
    policy = llama()
    if unfrozen:
        freeze_trunk(policy, unfrozen)
    actor_critic = make(policy)
    actor_critic = FrozenTrunk(actor_critic, unfrozen) if unfrozen else actor_critic
    evaluation, trained = (
        actor_critic.evaluate(joined(BATCH)),
        [p for p in actor_critic.parameters() if p.requires_grad],
    )
    of_policy, of_critic = (
        torch.autograd.grad(each.sum(), trained, retain_graph=True, allow_unused=True)
        for each in (evaluation.logprobs, evaluation.values)
    )
    both = [a is not None and b is not None for a, b in zip(of_policy, of_critic, strict=True)]
    assert actor_critic.critic_is_apart == (make is separate) == (not any(both))


def test_a_backward_stops_at_the_seam_and_can_be_taken_up():
    whole, parted = (separate(llama(tie_word_embeddings=False)) for _ in range(2))
    whole.evaluate(joined(BATCH)).logprobs.sum().backward()
    evaluation = parted.evaluate(joined(BATCH), detach_point=True)
    evaluation.logprobs.sum().backward()
    assert gradients(parted.policy).keys() == {"lm_head.weight"}
    evaluation.detach_point.backward()
    assert_same_gradients(gradients(parted), gradients(whole))


def test_a_separate_critic_sends_no_gradient_into_the_policy():
    actor_critic = separate(llama())
    actor_critic.evaluate(joined(BATCH)).values.sum().backward()
    assert all(parameter.grad is None for parameter in actor_critic.policy.parameters())
    assert actor_critic.value_head.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [separate, shared])
def test_every_trainable_parameter_is_in_exactly_one_group_at_its_own_rate(make):
    actor_critic = make(llama())
    actor, critic = actor_critic.parameter_groups(actor_lr=1e-3, critic_lr=1e-4)
    assert (actor["lr"], critic["lr"]) == (1e-3, 1e-4)
    assert {id(p) for p in actor["params"]} == {id(p) for p in actor_critic.policy.parameters()}
    grouped = [id(p) for p in actor["params"] + critic["params"]]
    assert sorted(grouped) == sorted(id(p) for p in actor_critic.parameters())


def test_frozen_embeddings_are_not_trained():
    policy = llama()
    policy.get_input_embeddings().requires_grad_(False)
    (group,) = alone(policy).parameter_groups(1e-3, 1e-3)
    assert all(p is not policy.get_input_embeddings().weight for p in group["params"])


def test_bf16_gives_float32_logprobs_close_to_fp32():
    actor_critic = shared(llama())
    with torch.no_grad():
        exact = actor_critic.evaluate(joined(BATCH))
        for backbone in actor_critic.backbones():
            backbone.bfloat16()
        rounded = actor_critic.evaluate(joined(BATCH))
    assert rounded.logprobs.dtype == rounded.values.dtype == torch.float32
    assert not torch.equal(rounded.logprobs, exact.logprobs)
    torch.testing.assert_close(rounded.logprobs, exact.logprobs, rtol=0, atol=0.06)  # 0.04 here


# ----- the head


def test_zeroed_head_predicts_0():
    assert ScalarHead(16, mlp_size=8).zero_()(torch.randn(3, 16)).tolist() == [0.0] * 3


@pytest.mark.parametrize("mlp_size", [None, 8])
def test_folding_moves_scale_and_shift_into_the_head(mlp_size):
    head, states = ScalarHead(16, mlp_size), torch.randn(5, 16)
    torch.nn.init.constant_(head.out.bias, 0.7)
    before = head(states)
    torch.testing.assert_close(head.fold_(3.0, -1.5)(states), 3.0 * before - 1.5)


def test_softcapped_logits_reach_the_logprobs():
    # A cap of 2 bounds the logits' spread to 4, so no token can have a log-probability below -(4 + log 24).
    logprobs = alone(gemma2()).evaluate(joined(BATCH)).logprobs
    assert logprobs.min().item() > -(4 + torch.tensor(24.0).log().item())
    assert EOS in BATCH.response_ids
