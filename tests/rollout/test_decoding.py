"""Slots that are refilled: the same responses, in fewer forwards."""

from __future__ import annotations

import pytest
import torch
from tiny import EOS, FAMILIES, PAD, engine, gemma2, llama, prompts, same_responses, script

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.rollout.kv_cache import BLOCK, BlockLayer
from chatrlhf.types import PromptBatch

ENDS = SamplingDistribution(eos_token_ids=(EOS, 2, 3, 4), forbidden_ids=(PAD,))
REFILLED = [family for family in FAMILIES if family != "gemma2"]


def given_lengths(sampler, lengths: list[int]) -> None:
    """Have each row say exactly so many tokens."""
    sampler.limits.per_row = lambda _: (torch.tensor(lengths), torch.tensor(lengths))


def any_batch(seed: int) -> tuple[PromptBatch, dict]:
    """Prompts of 1 to 15 tokens, one to three samples each, in any order; and limits."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 16, (9,), generator=draw).tolist()
    batch = prompts(lengths, seed=seed, samples=1 + seed % 3)
    batch = batch.select(torch.randperm(len(batch), generator=draw))
    options = [
        dict(max_new_tokens=20),
        dict(max_new_tokens=45, min_length=18),
        dict(max_new_tokens=30, max_length=24, min_new_tokens=3),
        dict(max_new_tokens=20, stop=["fg", "k", "xo"]),
    ]
    return batch, options[seed % 4]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", REFILLED)
def test_a_refilled_row_says_what_it_says_without(family, seed, forwards):
    model = FAMILIES[family]().eval()
    batch, options = any_batch(seed)
    whole = engine(model, ENDS, **options).generate(batch, seed)
    assert len(set(whole.lengths.tolist())) > 2
    seen = forwards(model)
    for size in (1, 2, 3, 5, 8) if family == "llama" else (2 + seed,):
        seen.clear()
        refilled = engine(model, ENDS, chunk_size=size, **options).generate(batch, seed)
        assert max(rows for rows, _ in seen) <= size
        assert same_responses(whole, refilled), size
        torch.testing.assert_close(refilled.sampling_logprobs, whole.sampling_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ragged", [[40, 1, 1, 2, 25, 3, 1, 30], [1] * 12])
def test_prompts_of_one_token_and_long_ones(ragged):
    model, batch = llama(max_position_embeddings=128), prompts(ragged)
    options = dict(max_new_tokens=60, max_length=128)
    whole = engine(model, ENDS, **options).generate(batch, seed=0)
    for size in (1, 3):
        assert same_responses(whole, engine(model, ENDS, chunk_size=size, **options).generate(batch, seed=0))


@pytest.mark.parametrize("family", REFILLED)
def test_new_prompts_of_one_token_behind_a_whole_block(family):
    """Nothing of the block is needed any more, and nothing of the new prompts is remembered yet."""
    model, batch = FAMILIES[family]().eval(), prompts([1] * 4)
    whole, refilled = (engine(model, SamplingDistribution(), max_new_tokens=32, chunk_size=size) for size in (None, 2))
    assert same_responses(whole.generate(batch, seed=0), refilled.generate(batch, seed=0))


def test_natural_lengths_need_fewer_forwards(forwards):
    """Counted, not timed: 4 slots, 16 rows of which a quarter is long."""
    model, lengths = llama(), [40, 4, 6, 5] * 4
    batch, seen = prompts([3] * 16), forwards(model)

    def steps(**options) -> tuple[int, int]:
        seen.clear()
        sampler = engine(model, SamplingDistribution(), max_new_tokens=40, **options)
        given_lengths(sampler, lengths)
        assert sampler.generate(batch, seed=0).lengths.tolist() == lengths
        return len(seen), sum(rows * columns for rows, columns in seen)

    refilled, refilled_tokens = steps(chunk_size=4)
    # Chunk after chunk each needs a prefill and 39 steps.
    assert refilled < 0.6 * 4 * 40
    # What is computed stays next to the least possible: prompts, and every drawn token but the last through the model.
    assert refilled_tokens <= 1.1 * (16 * 3 + sum(lengths) - 16)
    # And where all fit side by side nothing changes: one prefill, 39 steps.
    assert steps()[0] == steps(chunk_size=16)[0] == 40


def test_equal_lengths_are_refilled_all_at_once(forwards):
    model, batch = llama(), prompts([5] * 12)
    seen = forwards(model)
    engine(model, SamplingDistribution(), max_new_tokens=6, chunk_size=4).generate(batch, seed=0)
    assert [shape for shape in seen if shape[1] > 1] == [(4, 5), (4, 4), (4, 4)]
    assert len(seen) == 6 + 7 + 7


def test_samples_of_one_prompt_share_their_prefill_when_they_are_refilled(forwards):
    model, batch = llama(), prompts([4, 6, 3, 5], samples=4)
    seen = forwards(model)
    refilled = engine(model, SamplingDistribution(), max_new_tokens=6, chunk_size=4).generate(batch, seed=0)
    assert [shape for shape in seen if shape[1] > 1] == [(1, 6), (1, 4), (1, 3), (1, 2)]
    assert same_responses(refilled, engine(model, SamplingDistribution(), max_new_tokens=6).generate(batch, seed=0))


@pytest.fixture
def widths(untried, monkeypatch) -> list[int]:
    """Columns that are shown to each layer, from now on."""
    seen, update = [], BlockLayer.update

    def watched(self, *args, **kwargs):
        keys, values = update(self, *args, **kwargs)
        seen.append(keys.shape[2])
        return keys, values

    monkeypatch.setattr(BlockLayer, "update", watched)
    return seen


def test_columns_of_the_last_rows_are_forgotten_when_their_slots_are_refilled(widths):
    engine(llama(), SamplingDistribution(), max_new_tokens=50, chunk_size=4).generate(prompts([5] * 8), seed=0)
    assert widths[::2] == [5] + [32] * 27 + [64] * 22 + [4] + [32] * 10 + [64] * 32 + [96] * 8


def test_columns_of_a_long_prompt_are_forgotten_before_a_block_is_added(widths):
    """It ends at once and stays in its slot, one of twenty."""
    sampler = engine(llama(max_position_embeddings=128), SamplingDistribution(), max_new_tokens=60, max_length=128)
    given_lengths(sampler, [1] + [60] * 19)
    sampler.generate(prompts([60] + [2] * 19), seed=0)
    assert widths[::2] == [60] + [64] * 36 + [96] * 23


def test_the_memory_does_not_grow_without_end(widths):
    """Forty rows go through two slots, one behind the other; no row has more than 28 columns."""
    batch = prompts([8] * 40)
    refilled = engine(llama(), ENDS, max_new_tokens=20, chunk_size=2).generate(batch, seed=0)
    assert len(widths) / 2 > 100  # two layers
    assert max(widths) <= 2 * BLOCK
    assert same_responses(refilled, engine(llama(), ENDS, max_new_tokens=20).generate(batch, seed=0))


def test_a_window_is_not_refilled(forwards):
    model, batch = gemma2().eval(), prompts([4, 1, 6, 3, 2])
    seen = forwards(model)
    said = engine(model, SamplingDistribution(), max_new_tokens=6, chunk_size=2).generate(batch, seed=0)
    # Three chunks by length, one after the other, the shortest prompts first.
    assert seen[0::6] == [(2, 2), (2, 4), (1, 6)]
    assert len(seen) == 3 * 6
    assert same_responses(said, engine(model, SamplingDistribution(), max_new_tokens=6).generate(batch, seed=0))


def test_a_model_without_a_cache_is_refilled_too():
    batch = PromptBatch(
        torch.tensor([[2], [7], [5], [2]]), torch.ones(4, 1, dtype=torch.bool), torch.arange(4), [""] * 4
    )
    says = {2: 3, 3: 4, 4: EOS, 5: 6, 6: 6, 7: EOS}
    said = engine(script(says), max_new_tokens=4, chunk_size=2).generate(batch, seed=0)
    assert said.response_ids.tolist() == [[3, 4, EOS, PAD], [EOS, PAD, PAD, PAD], [6] * 4, [3, 4, EOS, PAD]]


def test_a_stop_string_is_looked_for_in_every_tokens_text():
    """Where rows are looked at every so many steps, a row has continued behind its stop string."""
    batch = prompts([3, 1, 6, 4, 2, 5] * 3)
    options = dict(max_new_tokens=25, stop=["f", "kk"])
    whole = engine(llama(), ENDS, **options).generate(batch, seed=1)
    assert len(set(whole.lengths.tolist())) > 2
    for every in (2, 5, 8):
        for size in (None, 4):
            seldom = engine(llama(), ENDS, chunk_size=size, look_every=every, **options).generate(batch, seed=1)
            assert same_responses(whole, seldom)
            torch.testing.assert_close(seldom.sampling_logprobs, whole.sampling_logprobs, rtol=0, atol=1e-5)
