"""`installed()`: inside, `import vllm` finds the stand-in of `standins/`, and TRL's code runs on it; and samplers."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import trl.generation.vllm_client
import trl.generation.vllm_generation
from tiny import tokenizer
from transformers import AutoModelForCausalLM

from chatrlhf.config.rl import VllmConfig
from chatrlhf.data.collate import prompt_batch
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.sequences import join
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.vllm import VllmSampler

STANDINS = str(Path(__file__).parent / "standins")
THERE = importlib.util.find_spec("vllm") is not None
without_vllm = pytest.mark.skipif(THERE, reason="vLLM is installed")


@contextmanager
def installed() -> Iterator[None]:
    if THERE:
        pytest.skip("vLLM itself is installed; these tests run on its stand-in")
    sys.path.insert(0, STANDINS)
    _look_again()
    try:
        yield
    finally:
        sys.path.remove(STANDINS)
        for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "vllm_server")]:
            del sys.modules[name]
        _look_again()


def _look_again() -> None:
    """TRL looks for vLLM while its modules are imported."""
    importlib.invalidate_caches()
    importlib.reload(trl.generation.vllm_client)
    importlib.reload(trl.generation.vllm_generation)


TOKENIZER = tokenizer()
EOS, PAD, VOCAB = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id, len(TOKENIZER)
ENDS = (EOS, *range(40, 100))  # many, so that rows of a random model end at different steps
PLAIN = SamplingDistribution(eos_token_ids=ENDS, forbidden_ids=(PAD,))


def scored(policy, distribution: SamplingDistribution, rollout) -> torch.Tensor:
    """The policy's log-probabilities of a rollout, as the scorer and the update compute them."""
    prompts = rollout.prompts
    sequences = join(
        prompts.input_ids, prompts.attention_mask, rollout.response_ids, rollout.response_mask, rollout.min_new_tokens
    )
    with torch.no_grad():
        return PolicyOnly(policy, distribution).evaluate(sequences).logprobs


def sampler(folder: Path, distribution: SamplingDistribution = PLAIN, policy=None, stop=(), **options) -> VllmSampler:
    limits = {"max_new_tokens": 8, "max_length": 40} | {
        name: options.pop(name)
        for name in ("max_new_tokens", "max_length", "min_new_tokens", "min_length")
        if name in options
    }
    settings = VllmConfig(**{name: options.pop(name) for name in list(options) if name in VllmConfig.model_fields})
    policy = policy or AutoModelForCausalLM.from_pretrained(folder).eval()
    return VllmSampler(policy, TOKENIZER, distribution, Limits(**limits), decode, settings, PAD, list(stop), **options)


def decode(ids: list[int]) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=True)


def ragged(lengths=(3, 9, 1, 6, 4, 2), samples: int = 1):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return prompt_batch(rows, [decode(row) for row in rows], PAD, samples)


def assert_lawful(rollout, distribution: SamplingDistribution, made: VllmSampler, tolerance: float = 1e-4) -> None:
    """Shapes, masks, ends and the log-probabilities of the policy itself."""
    lengths = rollout.lengths
    assert rollout.response_mask.dtype == torch.bool and rollout.response_mask.shape[1] == lengths.max()
    assert torch.equal(rollout.response_mask, torch.arange(int(lengths.max())) < lengths[:, None])
    most, fewest = made.limits.per_row(rollout.prompts.attention_mask.sum(dim=1))
    assert (lengths >= 1).all() and (lengths <= most).all() and torch.equal(rollout.min_new_tokens, fewest)
    assert (rollout.sampling_logprobs[~rollout.response_mask] == 0).all()
    assert (rollout.response_ids[~rollout.response_mask] == PAD).all()
    for i, n in enumerate(lengths.tolist()):
        ids = rollout.response_ids[i, :n].tolist()
        ended = ids[-1] in distribution.eos_token_ids
        assert not set(ids[:-1]) & set(distribution.eos_token_ids) and not set(ids) & set(distribution.forbidden_ids)
        if not made.stop:
            assert bool(rollout.finished[i]) == ended
            assert ended and n > fewest[i] or n == most[i]
            assert rollout.completions[i] == decode(ids[:-1] if ended else ids)
    want = scored(made.policy.float(), distribution, rollout)
    torch.testing.assert_close(rollout.sampling_logprobs, want, rtol=0, atol=tolerance)


DISTRIBUTIONS = {
    "plain": PLAIN,
    "cool": SamplingDistribution(0.6, ENDS, (PAD,)),
    "hot": SamplingDistribution(1.7, ENDS, (PAD,)),
    "many forbidden": SamplingDistribution(1.0, ENDS, (PAD, *range(100, 240))),
}
