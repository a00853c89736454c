"""Prompt and response joined into right-padded rows, and a model read at the right slots of them."""

import pytest
import torch
import twin
from tiny import (
    FAMILIES,
    PAD,
    PLAIN,
    VOCAB,
    Bigram,
    bloom,
    gemma2,
    gpt2,
    llama,
    opt,
    prompts,
    ragged_mask,
    rollout,
    widened,
)
from transformers import BertConfig, BertModel

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.kernels.packing import BUCKET
from chatrlhf.models.sequences import (
    Sequences,
    head_is_plain,
    is_causal,
    join,
    response_logits,
    response_logprobs,
    response_states,
)
from chatrlhf.types import Rollout


def joined(batch: Rollout) -> Sequences:
    prompt = batch.prompts
    return join(prompt.input_ids, prompt.attention_mask, batch.response_ids, batch.response_mask, batch.min_new_tokens)


def logprobs_by_rows(model, batch: Rollout) -> torch.Tensor:
    """[B, R] by running each row alone and unpadded, and picking each token's log-probability in a loop."""
    expected = torch.zeros(batch.response_mask.shape)
    for i, length in enumerate(batch.lengths.tolist()):
        prompt = batch.prompts.input_ids[i][batch.prompts.attention_mask[i]].tolist()
        response = batch.response_ids[i, :length].tolist()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + response])).logits[0]
        for t, token in enumerate(response):
            expected[i, t] = logits[len(prompt) + t - 1].log_softmax(-1)[token]
    return expected


# ----- join


def test_join_by_hand():
    sequences = join(
        prompt_ids=torch.tensor([[0, 0, 5], [6, 7, 8]]),
        prompt_mask=torch.tensor([[False, False, True], [True, True, True]]),
        response_ids=torch.tensor([[9, 1, 0], [2, 3, 1]]),
        response_mask=torch.tensor([[True, True, False], [True, True, True]]),
        min_new_tokens=torch.tensor([4, 0]),
    )
    # The longest row has 3 + 3 = 6 tokens; row 0 has 1 + 2 and padding behind, none in the middle.
    assert sequences.attention_mask.tolist() == [[True] * 3 + [False] * 3, [True] * 6]
    assert sequences.input_ids[0, :3].tolist() == [5, 9, 1]
    assert sequences.input_ids[1].tolist() == [6, 7, 8, 2, 3, 1]
    # Row 0: token 9 is predicted at place 0 (the prompt's last), token 1 at place 1.
    # Row 1 starts at 6 in the flat view: its tokens are predicted at places 2, 3, 4, so 8, 9, 10.
    assert sequences.slots.tolist() == [0, 1, 8, 9, 10]
    assert sequences.positions.tolist() == [0, 1, 0, 1, 2]
    assert sequences.tokens.tolist() == [9, 1, 2, 3, 1]
    assert sequences.min_new_tokens.tolist() == [4, 4, 0, 0, 0]


def test_the_token_behind_each_slot_is_the_one_it_predicts():
    sequences = joined(rollout(prompts([1, 5, 3]), [4, 2, 6]))
    assert torch.equal(sequences.input_ids.reshape(-1)[sequences.slots + 1], sequences.tokens)


def test_prompts_may_be_padded_anywhere():
    left = prompts([3, 1, 4])
    middle = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [1, 1, 0, 0, 1, 1]]).bool()
    ids = torch.full((3, 6), PAD).masked_scatter(middle, left.input_ids[left.attention_mask])
    responses, mask = torch.randint(2, VOCAB, (3, 4)), ragged_mask([4, 2, 1])
    got, want = join(ids, middle, responses, mask), join(left.input_ids, left.attention_mask, responses, mask)
    assert torch.equal(got.input_ids[got.attention_mask], want.input_ids[want.attention_mask])
    assert torch.equal(got.slots, want.slots)


def test_real_tokens_that_look_like_padding_are_kept():
    sequences = join(
        torch.tensor([[PAD, PAD, 5]]),
        torch.tensor([[False, True, True]]),
        torch.tensor([[PAD, 3, PAD]]),
        torch.tensor([[True, True, False]]),
    )
    assert sequences.input_ids[sequences.attention_mask].tolist() == [PAD, 5, PAD, 3]


def test_spread_puts_numbers_back_in_their_places():
    sequences = joined(rollout(prompts([2, 2]), [1, 3]))
    assert sequences.spread(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]]


# ----- reading a model


def test_a_logprob_scores_its_own_token_and_not_its_neighbour():
    # Behind token a the model gives token v probability table[a, v], all of them different.
    probabilities = torch.rand(6, 6) + 0.1
    probabilities /= probabilities.sum(1, keepdim=True)
    prompt, response = torch.tensor([[5, 2]]), torch.tensor([[4, 4, 0]])
    sequences = join(prompt, ragged_mask([2]), response, ragged_mask([3]))
    logprobs, _ = response_logprobs(response_logits(Bigram(probabilities.log()), sequences), sequences, PLAIN)
    # The response 4, 4, 0 behind 2: p(4 | 2), p(4 | 4), p(0 | 4)
    expected = torch.stack([probabilities[2, 4], probabilities[4, 4], probabilities[4, 0]])
    torch.testing.assert_close(logprobs.exp()[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_those_of_each_row_alone(family):
    model = FAMILIES[family]().eval()
    batch = rollout(prompts([3, 1, 6, 4]), [5, 2, 1, 7])
    sequences = joined(batch)
    with torch.no_grad():
        logprobs, _ = response_logprobs(response_logits(model, sequences), sequences, PLAIN)
    torch.testing.assert_close(logprobs, logprobs_by_rows(model, batch), rtol=0, atol=1e-5)
    assert (logprobs[~batch.response_mask] == 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_of_the_prompts_changes_nothing(family):
    model = FAMILIES[family]().eval()
    batch = rollout(prompts([3, 1, 6]), [5, 2, 4])
    wide = Rollout(**{**vars(batch), "prompts": widened(batch.prompts, 7)})
    with torch.no_grad():
        got, want = response_logits(model, joined(wide)), response_logits(model, joined(batch))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_the_plain_head_is_recognised():
    assert [head_is_plain(model) for model in (llama(), gpt2(), opt(), bloom())] == [True] * 4
    assert not head_is_plain(gemma2())


def test_a_cap_is_recognised_on_logits_far_below_it():
    # Logits of about 0.1 under a cap of 30: equal to the plain ones up to rounding, until training moves them.
    assert not head_is_plain(gemma2(initializer_range=0.02, final_logit_softcapping=30.0))


def test_recognising_the_head_leaves_dropout_as_it_was():
    model = gpt2(dropout=0.5)
    assert head_is_plain(model)
    assert model.training and model.transformer.drop.training


def test_states_given_or_not_the_logits_are_the_same():
    model, sequences = llama(), joined(rollout(prompts([3, 1]), [2, 4]))
    with torch.no_grad():
        given = response_logits(model, sequences, response_states(model.base_model, sequences))
        assert torch.equal(given, response_logits(model, sequences))


def test_what_fills_a_quantum_has_no_gradient():
    model, sequences = llama(), joined(rollout(prompts([3, 1]), [2, 4]))
    logits = response_logits(model, sequences)
    assert len(logits) == BUCKET > len(sequences.tokens)
    logits.retain_grad()
    response_logprobs(logits, sequences, PLAIN)[0].sum().backward()
    assert (logits.grad[6:] == 0).all() and logits.grad[:6].abs().amax(dim=1).min() > 0


def test_entropy_is_that_of_the_sampled_distribution():
    model, batch = llama(), rollout(prompts([3, 1]), [2, 4])
    batch.min_new_tokens = torch.tensor([2, 0])
    sequences = joined(batch)
    distribution = SamplingDistribution(temperature=0.8, eos_token_ids=(1,), forbidden_ids=(0,))
    with torch.no_grad():
        logits = response_logits(model, sequences)
    _, entropy = response_logprobs(logits, sequences, distribution, with_entropy=True)
    places = batch.response_mask.nonzero().tolist()
    for (i, t), row in zip(places, (logits[:6] / 0.8).tolist(), strict=True):
        row[0] = -torch.inf
        if t < batch.min_new_tokens[i]:
            row[1] = -torch.inf
        assert entropy[i, t].item() == pytest.approx(twin.entropy(row), rel=1e-5)


def test_causality_is_recognised():
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    bert = BertModel(BertConfig(vocab_size=VOCAB, **sizes))
    assert is_causal(llama().base_model)
    assert is_causal(gpt2(dropout=0.5).base_model)
    assert not is_causal(bert)
