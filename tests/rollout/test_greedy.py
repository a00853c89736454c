"""At a temperature near 0 the engine decodes greedily, and transformers' own generate says what must come out."""

import pytest
import torch
from tiny import FAMILIES, PAD, VOCAB, engine, prompts
from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.types import PromptBatch

NEVER = VOCAB  # as EOS: no token of the models


def made(family: str) -> nn.Module:
    """With a head of its own: where it is tied to the embeddings, a model this small says one token for ever."""
    return FAMILIES[family](tie_word_embeddings=False).eval()


def cold(*eos: int) -> SamplingDistribution:
    return SamplingDistribution(temperature=1e-4, eos_token_ids=eos)


def greedy(model: nn.Module, batch: PromptBatch, max_new_tokens: int, eos: int) -> Tensor:
    """What `generate` says, [B, R]; right-padded."""
    return model.generate(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask.long(),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos,
        pad_token_id=PAD,
    )[:, batch.input_ids.shape[1] :]


def divider(said: Tensor) -> int:
    """The token that, as EOS, would end rows [B, R] at the most different steps."""

    def steps(token: int) -> int:
        return len({row.index(token) if token in row else len(row) for row in said.tolist()})

    return max(range(VOCAB), key=steps)


LAYOUTS = {
    "even": prompts([4] * 9, seed=3),
    "left-padded": prompts([3, 1, 6, 4, 2, 5, 9, 1, 3], seed=3),
    # Groups out of order, and torn apart.
    "shared prefill": prompts([4, 1, 6], seed=3, samples=3).select(torch.tensor([8, 0, 3, 4, 1, 6, 2, 7, 5])),
}


REFILLED = [family for family in FAMILIES if family != "gemma2"]  # half of its layers see a window only


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cold_rollout_is_greedy_decoding(family, layout, forwards):
    model, batch = made(family), LAYOUTS[layout]
    eos = divider(greedy(model, batch, 12, NEVER))
    want = greedy(model, batch, 12, eos)
    seen = forwards(model)
    got = engine(model, cold(eos), max_new_tokens=12).generate(batch, seed=0)
    assert torch.equal(got.response_ids, want)
    sizes = [rows for rows, _ in seen]
    assert sizes[0] == len(batch.group_ids.unique())
    assert sizes[1] > sizes[-1]  # rows have left


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", REFILLED)
def test_greedy_decoding_with_rows_dropped_and_slots_refilled(family, layout, forwards):
    model, batch = made(family), LAYOUTS[layout]
    eos = divider(greedy(model, batch, 12, NEVER))
    want = greedy(model, batch, 12, eos)
    seen = forwards(model)
    got = engine(model, cold(eos), max_new_tokens=12, chunk_size=4).generate(batch, seed=0)
    assert torch.equal(got.response_ids, want)
    assert sum(width > 1 for _, width in seen) > 1  # prompts came later
    steps = [rows for rows, width in seen if width == 1]
    assert steps[0] == 4 > steps[-1]  # and at the end rows have left


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_rollout_is_greedy_decoding_too(family):
    """Over several blocks of the cache; every row ends where its own prompt leaves no more room."""
    model = made(family)
    batch = prompts([20, 1, 12, 4, 2, 17, 8, 7], seed=4)  # they reach 44 tokens at different steps
    got = engine(model, cold(), max_new_tokens=50, max_length=44).generate(batch, seed=0)
    for row in range(len(batch)):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row : row + 1, -length:]
        alone = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), torch.zeros(1, dtype=torch.long), [""])
        want = greedy(model, alone, 44 - length, NEVER)[0]
        assert torch.equal(got.response_ids[row][got.response_mask[row]], want), row
