"""Rollouts of encoder–decoders: the distribution that is scored, one reading of a prompt, and rows of their own."""

import pytest
import torch
from tiny import (
    ENCODER_DECODERS,
    EOS,
    PAD,
    PLAIN,
    VOCAB,
    bart,
    engine,
    flan_t5,
    prompts,
    same_responses,
    t5,
    widened,
)

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.sequences import moved_left
from chatrlhf.rollout.kv_cache import BlockLayer
from chatrlhf.types import Rollout

RAGGED = [3, 1, 6, 4, 2, 5]
ENDS = (EOS, 2, 3, 4, 5)
DISTRIBUTIONS = {
    "plain": SamplingDistribution(eos_token_ids=ENDS),
    "cool": SamplingDistribution(temperature=0.6, eos_token_ids=ENDS),
    "forbidden": SamplingDistribution(temperature=1.7, eos_token_ids=ENDS, forbidden_ids=(PAD, 7, 8)),
}


def scored(model, distribution: SamplingDistribution, batch: Rollout) -> torch.Tensor:
    actor_critic, prompt = PolicyOnly(model, distribution), batch.prompts
    sequences = actor_critic.sequences(
        prompt.input_ids, prompt.attention_mask, batch.response_ids, batch.response_mask, batch.min_new_tokens
    )
    with torch.no_grad():
        return actor_critic.evaluate(sequences).logprobs


@pytest.mark.parametrize("family", ENCODER_DECODERS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sampled_logprobs_are_the_scored_ones(family, name):
    model, distribution = ENCODER_DECODERS[family]().eval(), DISTRIBUTIONS[name]
    batch = engine(model, distribution, min_length=7).generate(prompts(RAGGED), seed=5)
    torch.testing.assert_close(batch.sampling_logprobs, scored(model, distribution, batch), rtol=0, atol=1e-5)
    assert (batch.sampling_logprobs[~batch.response_mask] == 0).all()
    assert not torch.isin(batch.response_ids[batch.response_mask], torch.tensor(distribution.forbidden_ids)).any()
    # At least 7 tokens with the prompt: another minimum for each row.
    assert (batch.lengths >= 7 - torch.tensor(RAGGED)).all() and batch.lengths.unique().numel() > 1


@pytest.mark.parametrize("family", ["flan_t5", "bart"])
def test_a_cold_rollout_is_greedy_decoding(family):
    """And transformers' own generate says what must come out."""
    # transformers' generate has no room for more layers in T5's decoder than there are in its encoder.
    sizes = {"num_decoder_layers": 2} if family == "flan_t5" else {}
    model, batch = ENCODER_DECODERS[family](seed=3, **sizes).eval(), prompts([3, 1, 6, 4, 2, 5, 9, 1, 3], seed=3)
    ids, mask = moved_left(batch.input_ids, batch.attention_mask)

    def greedy(eos: int) -> torch.Tensor:
        limits = dict(max_new_tokens=12, eos_token_id=eos, pad_token_id=PAD)
        return model.generate(input_ids=ids, attention_mask=mask.long(), do_sample=False, **limits)[:, 1:]

    first = greedy(VOCAB).tolist()  # never
    eos = max(range(VOCAB), key=lambda token: len({row.index(token) if token in row else 12 for row in first}))
    cold = SamplingDistribution(temperature=1e-4, eos_token_ids=(eos,))
    for chunk in (9, 4):
        got = engine(model, cold, max_new_tokens=12, chunk_size=chunk).generate(batch, seed=0)
        assert torch.equal(got.response_ids, greedy(eos))
    assert got.lengths.unique().numel() > 2


@pytest.mark.parametrize("family", ["flan_t5", "bart"])
def test_responses_longer_than_a_block_of_memory_are_scored_alike(family, monkeypatch):
    widths = set()
    update = BlockLayer.update

    def watched(self, *args, **kwargs):
        found = update(self, *args, **kwargs)
        widths.add(found[0].shape[2])
        return found

    monkeypatch.setattr(BlockLayer, "update", watched)
    model = ENCODER_DECODERS[family](max_position_embeddings=128).eval()
    limits = dict(max_new_tokens=70, max_length=128, min_new_tokens=40)
    batch = engine(model, PLAIN, **limits).generate(prompts(RAGGED), seed=1)
    assert batch.lengths.max() == 70 and widths == {1, 32, 64, 96}  # written in place, in whole blocks
    torch.testing.assert_close(batch.sampling_logprobs, scored(model, PLAIN, batch), rtol=0, atol=1e-4)


def test_two_tokens_come_as_often_as_the_model_says():
    model, samples = t5(vocab_size=6).eval(), 5000
    distribution = SamplingDistribution(temperature=1.7, eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    batch = prompts([3, 1], samples=samples)
    batch.input_ids[batch.attention_mask] %= 4
    batch.input_ids[batch.attention_mask] += 2
    said = engine(model, distribution, max_new_tokens=2).generate(batch, seed=0).response_ids

    def probabilities(row: int, *prefix: int) -> torch.Tensor:
        prompt = batch.input_ids[row][batch.attention_mask[row]][None]
        with torch.no_grad():
            logits = model(input_ids=prompt, decoder_input_ids=torch.tensor([[PAD, *prefix]])).logits[0, -1] / 1.7
        logits[PAD] = -torch.inf
        return logits.softmax(0)

    for row in (0, samples):
        first = probabilities(row)
        expected = samples * torch.stack([first[a] * probabilities(row, a) for a in range(6)])
        expected[EOS] = 0
        expected[EOS, PAD] = samples * first[EOS]  # nothing behind it
        seen = torch.bincount(said[row : row + samples] @ torch.tensor([6, 1]), minlength=36).view(6, 6)
        possible = expected > 5
        assert seen[expected == 0].sum() == 0
        chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
        assert chi_square < 45.3  # at most 20 degrees of freedom, exceeded by chance once in 1,000 seeds


@pytest.mark.parametrize("family", ["flan_t5", "bart"])
def test_what_a_row_says_depends_on_neither_padding_nor_company(family):
    model = ENCODER_DECODERS[family]().eval()
    made = engine(model, DISTRIBUTIONS["plain"])
    want = made.generate(prompts(RAGGED), seed=3)
    assert 0 < want.finished.sum() < 6
    assert same_responses(made.generate(widened(prompts(RAGGED), 7), seed=3), want)
    assert same_responses(engine(model, DISTRIBUTIONS["plain"], chunk_size=2).generate(prompts(RAGGED), seed=3), want)
    own = made.generate(prompts(RAGGED), seed=3, rows=torch.tensor([4, 1]))
    assert own.completions == [want.completions[4], want.completions[1]]


def test_a_prompt_is_read_once_for_all_its_samples_and_steps():
    model = flan_t5().eval()
    read, given = [], []
    model.get_encoder().register_forward_pre_hook(
        lambda _, __, named: read.append(named["input_ids"]), with_kwargs=True
    )
    first = model.decoder.block[0].layer[1].EncDecAttention.k
    first.register_forward_pre_hook(lambda _, states: given.append(states[0].shape[0]))
    batch = engine(model, min_new_tokens=8).generate(prompts([3, 1, 6], samples=4), seed=0)
    assert batch.lengths.tolist() == [8] * 12
    assert [len(ids) for ids in read] == [3] and read[0].shape[1] == 6
    assert given == [3]  # keys of prompts, too, are made once
    assert len(set(batch.completions)) > 6


def test_an_immediate_eos_is_one_real_token():
    model = bart().eval()
    with torch.no_grad():
        model.final_logits_bias[0, EOS] = 1000.0
    batch = engine(model).generate(prompts(RAGGED), seed=0)
    assert batch.response_ids.tolist() == [[EOS]] * 6 and batch.response_mask.all() and batch.finished.all()
    assert batch.completions == [""] * 6
    later = engine(model, min_new_tokens=2).generate(prompts(RAGGED), seed=0)
    assert later.lengths.tolist() == [3] * 6 and (later.response_ids[:, 2] == EOS).all()


def test_rows_that_have_ended_leave_and_a_stop_string_ends_one():
    model = flan_t5().eval()
    plain = engine(model, SamplingDistribution(), max_new_tokens=20).generate(prompts(RAGGED), seed=0)
    stop = plain.completions[0][3]
    batch = engine(model, SamplingDistribution(), max_new_tokens=20, stop=[stop]).generate(prompts(RAGGED), seed=0)
    for text, whole, length in zip(batch.completions, plain.completions, batch.lengths.tolist(), strict=True):
        found = whole.find(stop)
        assert (text, length) == ((whole, 20) if found < 0 else (whole[:found], found + 1))
    assert batch.finished[0] and not batch.finished.all()


def test_it_is_neither_refilled_nor_recorded():
    made = engine(t5().eval(), static=True)
    assert not made.in_place and made.generate(prompts([2, 3]), seed=0).response_ids.max() < VOCAB
    assert made.direct is None and made.graphs.held is None
