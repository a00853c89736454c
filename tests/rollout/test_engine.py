"""The rollout engine against the scorer and against written-down distributions."""

import pytest
import torch
from tiny import (
    EOS,
    FAMILIES,
    PAD,
    PLAIN,
    VOCAB,
    Bigram,
    engine,
    gpt2,
    llama,
    prompts,
    same_responses,
    script,
    widened,
    words,
)

from chatrlhf.conversation import Prompt
from chatrlhf.errors import DivergedError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.sequences import join
from chatrlhf.types import PromptBatch, Rollout

RAGGED = [3, 1, 6, 4, 2, 5]
ENDS = (EOS, 2, 3, 4, 5)  # many, so that rows of a random model end at different steps


def scored(model, distribution: SamplingDistribution, batch: Rollout) -> torch.Tensor:
    """The policy's log-probabilities of a rollout, as the scorer and the update compute them."""
    prompt = batch.prompts
    sequences = join(
        prompt.input_ids, prompt.attention_mask, batch.response_ids, batch.response_mask, batch.min_new_tokens
    )
    with torch.no_grad():
        return PolicyOnly(model, distribution).evaluate(sequences).logprobs


def one_prompt(*ids: int, rows: int = 1) -> PromptBatch:
    prompt = torch.tensor([ids] * rows)
    mask = torch.ones_like(prompt, dtype=torch.bool)
    return PromptBatch(prompt, mask, torch.arange(rows), [Prompt.of(words(list(ids)))] * rows)


# ----- the distribution that is sampled is the one that is scored

DISTRIBUTIONS = {
    "plain": SamplingDistribution(eos_token_ids=ENDS),
    "cool": SamplingDistribution(temperature=0.6, eos_token_ids=ENDS),
    "hot": SamplingDistribution(temperature=1.7, eos_token_ids=ENDS),
    "forbidden": SamplingDistribution(eos_token_ids=ENDS, forbidden_ids=(PAD, 7, 8)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sampled_logprobs_are_the_scored_ones(family, name):
    model, distribution = FAMILIES[family]().eval(), DISTRIBUTIONS[name]
    # At least 7 tokens with the prompt: another minimum for each row.
    batch = engine(model, distribution, min_length=7).generate(prompts(RAGGED), seed=5)
    torch.testing.assert_close(batch.sampling_logprobs, scored(model, distribution, batch), rtol=0, atol=1e-5)
    assert (batch.sampling_logprobs[~batch.response_mask] == 0).all()
    assert batch.sampling_logprobs.isfinite().all()


def test_sampled_tokens_are_not_always_the_likeliest():
    # Otherwise the test above could not tell the sampled token's log-probability from the best one's.
    batch = engine(llama()).generate(prompts(RAGGED), seed=5)
    assert batch.sampling_logprobs[batch.response_mask].exp().min() < 0.3


def test_sampled_frequencies_are_the_softmax():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 0.0, 1.5])
    rows = 8000
    batch = engine(Bigram(logits.expand(8, 8)), max_new_tokens=1).generate(one_prompt(3, rows=rows), seed=0)
    expected = logits.softmax(0) * rows
    chi_square = ((torch.bincount(batch.response_ids[:, 0], minlength=8) - expected) ** 2 / expected).sum().item()
    assert chi_square < 24.3  # 7 degrees of freedom, exceeded by chance once in 1,000 seeds


def test_frequencies_of_two_tokens_are_the_models_probabilities():
    """Two prompts of unlike length, so with padding, a shared prefill and a step through the cache."""
    model, samples = llama(vocab=6), 5000
    distribution = SamplingDistribution(temperature=1.7, eos_token_ids=(EOS,), forbidden_ids=(PAD,))
    ids, mask = torch.tensor([[PAD, PAD, 2], [4, 5, 3]]), torch.tensor([[False, False, True], [True] * 3])
    group = torch.arange(2).repeat_interleave(samples)
    batch = PromptBatch(ids[group], mask[group], group, [""] * len(group))
    said = engine(model, distribution, max_new_tokens=2).generate(batch, seed=0).response_ids

    def probabilities(*prefix: int) -> torch.Tensor:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prefix])).logits[0, -1] / 1.7
        logits[PAD] = -torch.inf
        return logits.softmax(0)

    for row, prompt in enumerate(([2], [4, 5, 3])):
        first = probabilities(*prompt)
        expected = samples * torch.stack([first[a] * probabilities(*prompt, a) for a in range(6)])
        expected[EOS] = 0
        expected[EOS, PAD] = samples * first[EOS]  # nothing behind it
        seen = torch.bincount(said[group == row] @ torch.tensor([6, 1]), minlength=36).view(6, 6)
        possible = expected > 0
        assert possible.sum() == 21 and expected[possible].min() > 5
        assert seen[~possible].sum() == 0
        chi_square = ((seen - expected)[possible] ** 2 / expected[possible]).sum().item()
        assert chi_square < 45.3  # 20 degrees of freedom, exceeded by chance once in 1,000 seeds


def test_forbidden_ids_are_never_sampled():
    distribution = SamplingDistribution(temperature=3.0, eos_token_ids=(EOS,), forbidden_ids=(PAD, 5, VOCAB - 1))
    batch = engine(llama(), distribution, max_new_tokens=20).generate(prompts([3] * 40), seed=0)
    assert not torch.isin(batch.response_ids[batch.response_mask], torch.tensor(distribution.forbidden_ids)).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_has_ended_does_not_outrun_the_models_positions(family):
    # The long prompt fills all 64 positions and then waits in the batch, one row of seventeen, for the others.
    model, distribution = FAMILIES[family]().eval(), SamplingDistribution(forbidden_ids=(EOS,))
    batch = engine(model, distribution, max_new_tokens=20, max_length=64).generate(prompts([60] + [3] * 16), seed=0)
    assert batch.lengths.tolist() == [4] + [20] * 16
    torch.testing.assert_close(batch.sampling_logprobs, scored(model, distribution, batch), rtol=0, atol=1e-5)


# ----- what a row says is its own affair


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_do_not_depend_on_the_chunk_they_are_decoded_in(family):
    model, distribution = FAMILIES[family]().eval(), SamplingDistribution(eos_token_ids=ENDS)
    whole, pairs, single = (
        engine(model, distribution, chunk_size=size).generate(prompts(RAGGED), seed=1) for size in (None, 4, 1)
    )
    assert len(set(whole.lengths.tolist())) > 1  # rows leave the batch at different steps
    assert same_responses(whole, pairs) and same_responses(whole, single)
    torch.testing.assert_close(whole.sampling_logprobs, single.sampling_logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_says_the_same_whoever_shares_its_batch(family):
    """Alone; sorted before, between and behind others; among many, few of which are left at the end."""
    model, distribution = FAMILIES[family]().eval(), SamplingDistribution(eos_token_ids=ENDS)
    others = [], [9, 9], [1, 2, 3], [1, 12, 7, 5], [3, 12, 5, 7, 1], [20] * 5 + [6] * 20
    compared = 0
    for seed in range(4):
        # Row 0 is the same prompt and has the same uniform numbers each time.
        alone, *shared = (
            engine(model, distribution, max_new_tokens=12).generate(prompts([6, *rest], seed=seed), seed=seed)
            for rest in others
        )
        want = alone.response_ids[0]
        for batch in shared:
            mask = batch.response_mask[0]
            assert torch.equal(batch.response_ids[0][mask], want)
            got = batch.sampling_logprobs[0][mask]
            torch.testing.assert_close(got, alone.sampling_logprobs[0], rtol=0, atol=1e-5)
        compared += len(want)
    assert compared > 8


def test_rows_do_not_depend_on_left_padding():
    batches = prompts(RAGGED), widened(prompts(RAGGED), 9)
    narrow, wide = (engine(llama()).generate(batch, seed=1) for batch in batches)
    assert same_responses(narrow, wide)


@pytest.mark.parametrize("family", FAMILIES)
def test_pad_may_be_eos(family):
    model = FAMILIES[family]().eval()
    apart = engine(model, pad=PAD).generate(prompts(RAGGED, pad=PAD), seed=1)
    same = engine(model, pad=EOS).generate(prompts(RAGGED, pad=EOS), seed=1)
    assert same_responses(apart, same)
    torch.testing.assert_close(scored(model, PLAIN, apart), scored(model, PLAIN, same), rtol=0, atol=1e-5)


def test_equal_seeds_give_equal_rollouts_and_others_do_not():
    first, again, other = (engine(llama()).generate(prompts(RAGGED), seed=seed) for seed in (1, 1, 2))
    assert same_responses(first, again) and torch.equal(first.sampling_logprobs, again.sampling_logprobs)
    assert not same_responses(first, other)


def test_rows_of_one_group_are_sampled_independently():
    batch = engine(llama()).generate(prompts([4], samples=6), seed=0)
    assert batch.prompts.group_ids.tolist() == [0] * 6
    assert len(set(batch.completions)) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_one_prompt_share_its_prefill_and_nothing_else(family, forwards):
    model, batch = FAMILIES[family]().eval(), prompts([4, 1, 3], samples=3)
    batch = batch.select(torch.tensor([8, 0, 3, 4, 1, 6, 2, 7, 5]))  # groups out of order, and torn apart
    apart = PromptBatch(batch.input_ids, batch.attention_mask, torch.arange(9), batch.prompts)
    seen = forwards(model)
    shared = engine(model).generate(batch, seed=2)
    assert [rows for rows, _ in seen[:2]] == [3, 9]
    assert same_responses(shared, engine(model).generate(apart, seed=2))


def test_a_rollout_leaves_the_global_random_numbers_alone():
    sampler = engine(llama())
    before = torch.get_rng_state()
    sampler.generate(prompts(RAGGED), seed=1)
    assert torch.equal(torch.get_rng_state(), before)


# ----- how a response ends

# Behind token 2 it says 3, 4, EOS; behind 5 it says 6 for ever; behind 7 EOS at once.
SAYS = {2: 3, 3: 4, 4: EOS, 5: 6, 6: 6, 7: EOS, EOS: EOS}


def test_eos_is_a_real_token_and_finishes_the_response():
    batch = engine(script(SAYS)).generate(one_prompt(2), seed=0)
    assert batch.response_ids.tolist() == [[3, 4, EOS]]
    assert batch.response_mask.tolist() == [[True] * 3]
    assert batch.finished.tolist() == [True]
    assert batch.completions == [words([3, 4])]


def test_a_response_cut_by_length_is_not_finished():
    batch = engine(script(SAYS), max_new_tokens=4).generate(one_prompt(5), seed=0)
    assert batch.response_ids.tolist() == [[6, 6, 6, 6]]
    assert batch.finished.tolist() == [False]
    assert batch.completions == [words([6] * 4)]


def test_an_immediate_eos_is_one_real_token():
    batch = engine(script(SAYS)).generate(one_prompt(7), seed=0)
    assert batch.response_mask.tolist() == [[True]]
    assert batch.finished.tolist() == [True]
    assert batch.completions == [""]


def test_eos_at_the_last_allowed_place_still_finishes():
    batch = engine(script(SAYS), max_new_tokens=3).generate(one_prompt(2), seed=0)
    assert batch.finished.tolist() == [True]


def test_responses_of_different_length_are_padded_on_the_right():
    ids = torch.tensor([[2], [7], [5]])
    batch = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(3), ["", "", ""])
    batch = engine(script(SAYS), max_new_tokens=5).generate(batch, seed=0)
    assert batch.response_ids.tolist() == [[3, 4, EOS, PAD, PAD], [EOS, PAD, PAD, PAD, PAD], [6] * 5]
    assert batch.response_mask.sum(1).tolist() == [3, 1, 5]
    assert batch.finished.tolist() == [True, True, False]


def test_any_of_several_eos_tokens_ends_a_response():
    batch = engine(script(SAYS), SamplingDistribution(eos_token_ids=(EOS, 4))).generate(one_prompt(2), seed=0)
    assert batch.response_ids.tolist() == [[3, 4]]
    assert batch.completions == [words([3])]


def test_max_length_counts_each_rows_own_prompt():
    ids = torch.tensor([[PAD, PAD, 5], [6, 6, 5]])
    batch = PromptBatch(ids, torch.tensor([[False, False, True], [True] * 3]), torch.arange(2), ["", ""])
    batch = engine(script(SAYS), max_new_tokens=6, max_length=5).generate(batch, seed=0)
    assert batch.lengths.tolist() == [4, 2]


def test_eos_cannot_come_before_the_minimum():
    # Behind every token EOS is all but certain; it comes at the first place where it may.
    table = torch.zeros(8, 8)
    table[:, EOS] = 50.0
    ids = torch.tensor([[PAD, PAD, 5], [6, 6, 5]])
    batch = PromptBatch(ids, torch.tensor([[False, False, True], [True] * 3]), torch.arange(2), ["", ""])
    limited = engine(Bigram(table), min_new_tokens=2, min_length=6).generate(batch, seed=0)
    # Row 0 (prompt of 1) needs 5 tokens, row 1 (prompt of 3) needs 3, then EOS.
    assert limited.min_new_tokens.tolist() == [5, 3]
    assert limited.lengths.tolist() == [6, 4]
    assert limited.finished.tolist() == [True, True]
    torch.testing.assert_close(limited.sampling_logprobs, scored(Bigram(table), PLAIN, limited), rtol=0, atol=1e-5)


# ----- stop strings


def test_a_stop_string_finishes_the_response_and_leaves_its_text():
    # 3, 4 spell "de": the row ends with them in its mask, the text ends before them.
    says = {2: 6, 6: 3, 3: 4, 4: 5}
    batch = engine(script(says), stop=["de"]).generate(one_prompt(2), seed=0)
    assert batch.response_ids.tolist() == [[6, 3, 4]]
    assert batch.response_mask.tolist() == [[True] * 3]
    assert batch.finished.tolist() == [True]
    assert batch.completions == ["g"]


def test_of_several_stop_strings_the_one_that_starts_first_cuts_the_text():
    # Token 3 completes both "d" and "gd".
    says = {2: 5, 5: 6, 6: 3, 3: 4}
    batch = engine(script(says), stop=["e", "d", "gd"]).generate(one_prompt(2), seed=0)
    assert batch.response_ids.tolist() == [[5, 6, 3]]
    assert batch.completions == ["f"]


def test_a_stop_string_in_the_prompt_does_not_count():
    batch = engine(script(SAYS), stop=["c"]).generate(one_prompt(2, 2), seed=0)
    assert batch.response_ids.tolist() == [[3, 4, EOS]]


def test_a_stopped_row_leaves_the_others_as_they_were():
    without, stopped = (engine(llama(), stop=stop).generate(prompts(RAGGED), seed=1) for stop in ([], ["f", "k"]))
    assert not same_responses(without, stopped)
    for i, length in enumerate(stopped.lengths.tolist()):
        assert torch.equal(stopped.response_ids[i, :length], without.response_ids[i, :length])
        got, want = (batch.sampling_logprobs[i, :length] for batch in (stopped, without))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_a_policy_that_has_diverged_is_an_error():
    model = script(SAYS)
    with torch.no_grad():
        model.head.weight[0, 0] = torch.nan
    with pytest.raises(DivergedError, match="1 of 1 rollouts.*actor_lr"):
        engine(model).generate(one_prompt(2), seed=0)


def test_dropout_of_the_policy_is_off_once_it_is_part_of_a_topology():
    model = gpt2(dropout=0.5)
    PolicyOnly(model, PLAIN)
    first, again = (engine(model).generate(prompts(RAGGED), seed=1) for _ in range(2))
    assert torch.equal(first.sampling_logprobs, again.sampling_logprobs)
