"""Prompts for an encoder, responses for a decoder: alignment, invariances, and transformers' own forward as a twin."""

import copy

import pytest
import torch
from tiny import (
    ENCODER_DECODERS,
    EOS,
    PAD,
    assert_same_gradients,
    bart,
    flan_t5,
    gradients,
    llama,
    prompts,
    rollout,
    t5,
    widened,
)

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.kernels.attention import NAME, patch_attention
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import head_is_plain, join
from chatrlhf.models.sequences_seq2seq import Seq2SeqSequences, pair, sequences_for
from chatrlhf.types import Rollout

BATCH = rollout(prompts([3, 1, 6]), [5, 2, 4])
ODD = SamplingDistribution(temperature=0.8, eos_token_ids=(EOS, 2, 3), forbidden_ids=(PAD,))


def alone(policy) -> ActorCritic:
    return PolicyOnly(policy, ODD)


def separate(policy) -> SeparateCritic:
    return SeparateCritic(policy, copy.deepcopy(backbone_of(policy)), ScalarHead(16), ODD)


def shared(policy) -> SharedTrunk:
    return SharedTrunk(policy, ScalarHead(16), ODD)


def paired(actor_critic: ActorCritic, batch: Rollout = BATCH) -> Seq2SeqSequences:
    prompt = batch.prompts
    parts = prompt.input_ids, prompt.attention_mask, batch.response_ids, batch.response_mask, batch.min_new_tokens
    return actor_critic.sequences(*parts)


def rows(batch: Rollout):
    """Prompt and response of each row, alone and without padding, [1, .]."""
    for i, length in enumerate(batch.lengths.tolist()):
        yield batch.prompts.input_ids[i][batch.prompts.attention_mask[i]][None], batch.response_ids[i : i + 1, :length]


def test_a_pair_by_hand():
    sequences = pair(
        prompt_ids=torch.tensor([[0, 0, 5], [6, 7, 8]]),
        prompt_mask=torch.tensor([[False, False, True], [True, True, True]]),
        response_ids=torch.tensor([[9, 1, 0], [2, 3, 1]]),
        response_mask=torch.tensor([[True, True, False], [True, True, True]]),
        min_new_tokens=torch.tensor([4, 0]),
        start=4,
    )
    # Prompts stand to the left: BART counts positions from there.
    assert sequences.input_ids[0, 0] == 5 and sequences.input_ids[1].tolist() == [6, 7, 8]
    assert sequences.attention_mask.tolist() == [[True, False, False], [True, True, True]]
    # Token t is predicted at decoder input t, the first of which is the start token.
    assert sequences.decoder_ids.tolist() == [[4, 9, 1], [4, 2, 3]]
    assert sequences.slots.tolist() == [0, 1, 3, 4, 5]
    assert sequences.positions.tolist() == [0, 1, 0, 1, 2]
    assert sequences.tokens.tolist() == [9, 1, 2, 3, 1]
    assert sequences.min_new_tokens.tolist() == [4, 4, 0, 0, 0]


def test_a_causal_policy_reads_joined_rows():
    assert sequences_for(llama().config) is join


@pytest.mark.parametrize("make", [alone, separate, shared])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_logprobs_are_those_of_the_models_own_forward_with_labels(family, make):
    policy = ENCODER_DECODERS[family]()  # with dropout, until it is part of an actor-critic
    actor_critic = make(policy)
    got = actor_critic.evaluate(paired(actor_critic)).logprobs
    for i, (prompt, response) in enumerate(rows(BATCH)):
        logits = policy(input_ids=prompt, labels=response).logits[0] / 0.8
        logits[:, PAD] = -torch.inf
        want = [logits[t].log_softmax(0)[token] for t, token in enumerate(response[0].tolist())]
        torch.testing.assert_close(got[i, : len(want)], torch.stack(want), rtol=0, atol=1e-5)
    assert (got[~BATCH.response_mask] == 0).all()


@pytest.mark.parametrize("make", [separate, shared])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_value_is_read_at_the_decoder_input_before_its_token(make, family):
    actor_critic = make(ENCODER_DECODERS[family]())
    values = actor_critic.evaluate(paired(actor_critic)).values
    backbone = actor_critic.critic if make is separate else backbone_of(actor_critic.policy)
    start = torch.tensor([[actor_critic.policy.config.decoder_start_token_id]])
    for i, (prompt, response) in enumerate(rows(BATCH)):
        for t in range(response.shape[1]):
            # Given the tokens *before* t alone; its last state is what V may know.
            prefix = torch.cat([start, response[:, :t]], dim=1)
            states = backbone(input_ids=prompt, decoder_input_ids=prefix).last_hidden_state
            torch.testing.assert_close(values[i, t], actor_critic.value_head(states[0, -1]), rtol=0, atol=1e-5)
    assert (values[~BATCH.response_mask] == 0).all()


@pytest.mark.parametrize("make", [separate, shared])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_neither_padding_nor_the_order_of_rows_has_a_say(make, family):
    actor_critic = make(ENCODER_DECODERS[family]())
    order = torch.tensor([2, 0, 1])
    moved = Rollout(
        widened(BATCH.prompts, 5).select(order),
        torch.nn.functional.pad(BATCH.response_ids, (0, 3), value=EOS)[order],
        torch.nn.functional.pad(BATCH.response_mask, (0, 3))[order],
        torch.zeros(3, 8),
        BATCH.finished[order],
        BATCH.min_new_tokens[order],
        [BATCH.completions[i] for i in order],
    )
    got, want = (
        actor_critic.evaluate(paired(actor_critic, moved), True),
        actor_critic.evaluate(paired(actor_critic), True),
    )
    for name in ("logprobs", "values", "entropy"):
        torch.testing.assert_close(getattr(got, name)[:, :5], getattr(want, name)[order], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_fresh_policy_is_its_reference(family):
    actor_critic = alone(ENCODER_DECODERS[family]())
    reference = actor_critic.reference()
    got = actor_critic.evaluate(paired(actor_critic)).logprobs
    torch.testing.assert_close(reference.logprobs(paired(actor_critic)), got, rtol=0, atol=1e-5)
    with torch.no_grad():
        actor_critic.policy.get_output_embeddings().weight.mul_(0.5)
    assert (
        reference.logprobs(paired(actor_critic)) - actor_critic.evaluate(paired(actor_critic)).logprobs
    ).abs().max() > 1e-2


def test_only_a_head_that_does_nothing_more_is_plain():
    assert [head_is_plain(make()) for make in (t5, flan_t5, bart)] == [False, True, False]
    assert not head_is_plain(bart().bfloat16())  # whose bias is float32


@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
def test_our_attention_gives_the_same_gradients_down_to_the_bias_of_relative_positions(family):
    usual = alone(ENCODER_DECODERS[family]())
    ours = copy.deepcopy(usual)
    # T5's stacks have configurations of their own, which transformers leaves alone when the model is told.
    for model in (ours.policy.get_encoder(), ours.policy.get_decoder()):
        patch_attention(model, torch.device("cpu"))
        assert model.config._attn_implementation == NAME
    for actor_critic in (usual, ours):
        actor_critic.evaluate(paired(actor_critic)).logprobs.sum().backward()
    # A bias of the keys has no gradient but rounding: it moves all scores of a query alike.
    want, got = ({n: each for n, each in gradients(made).items() if "k_proj.bias" not in n} for made in (usual, ours))
    assert_same_gradients(got, want, tolerance=1e-4)
    assert family == "bart" or any("relative_attention_bias" in name and each.any() for name, each in want.items())
