"""How often the rollout engine says another token in bfloat16 because other rows share the batch.

A row draws with uniform numbers of its own, so in exact arithmetic what it says depends on nothing but itself. But
kernels sum in another order when the batch has another size, and bfloat16 keeps eight bits of each result. Between
the tokens lie as many borders as there are tokens, all of them move a little, and now and then one passes the number
that was drawn. The distribution sampled is as good as before; only the sample is another one.

Here a small Llama decodes the same rollout batch in chunks of several sizes, and each row is compared with itself
decoded alone, up to its first other token: behind it the rows are different sequences. float32 is for comparison.

    python -m benchmarks.bf16_flips
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chatrlhf.data.collate import prompt_batch
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.types import PromptBatch, Rollout

VOCAB, EOS, PAD = 1024, 1, 0
CHUNKS = (4, 16, 64)


def make_model(sharpness: float, seed: int = 0) -> LlamaForCausalLM:
    """1.1 M weights; ``sharpness`` multiplies the logits.

    The head alone decides how unequal the tokens' probabilities are: wider weights below it would do so too, but
    they also enlarge rounding from layer to layer.
    """
    torch.manual_seed(seed)
    sizes = dict(hidden_size=128, intermediate_size=344, num_hidden_layers=4, num_attention_heads=4)
    ids = dict(bos_token_id=None, eos_token_id=EOS, pad_token_id=PAD)
    config = LlamaConfig(vocab_size=VOCAB, max_position_embeddings=256, initializer_range=0.08, **sizes, **ids)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(sharpness)
    return model


def make_prompts(rows: int, seed: int = 0) -> PromptBatch:
    """Random prompts of 4 to 32 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 33, (rows,), generator=generator).tolist()
    ids = [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return prompt_batch(ids, [""] * rows, PAD)


def flips(alone: Rollout, shared: Rollout) -> tuple[int, int]:
    """Rows that come to say another token, and the tokens up to there (of the other rows: all)."""
    flipped = tokens = 0
    for row, length in enumerate(alone.lengths.tolist()):
        # Equal tokens end a row at the same step, so the shorter row cannot be a prefix of the longer one.
        width = min(length, int(shared.lengths[row]))
        differs = (alone.response_ids[row, :width] != shared.response_ids[row, :width]).nonzero()
        flipped += len(differs) > 0
        tokens += int(differs[0]) + 1 if len(differs) else length
    return flipped, tokens


def measure(
    dtype: torch.dtype, sharpness: float, rows: int, max_new_tokens: int, seed: int = 0
) -> tuple[float, dict[int, tuple[int, int]]]:
    """The entropy, nats per token; and (rows that flipped, tokens compared) by chunk size, against rows alone."""
    model, prompts = make_model(sharpness).to(dtype), make_prompts(rows, seed)

    def decode(chunk_size: int) -> Rollout:
        distribution = SamplingDistribution(eos_token_ids=(EOS,), forbidden_ids=(PAD,))
        limits = Limits(max_new_tokens, max_length=256)
        return RolloutEngine(model, distribution, limits, PAD, lambda _: "", chunk_size=chunk_size).generate(
            prompts, seed
        )

    alone = decode(1)
    entropy = -float(alone.sampling_logprobs.sum() / alone.response_mask.sum())
    return entropy, {size: flips(alone, decode(size)) for size in CHUNKS}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bf16_flips", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--sharpness", type=float, nargs="+", default=[4.0, 1.0], help="what logits are multiplied by")
    options = parser.parse_args(arguments)
    print(f"{options.rows} rows; of a chunk size, how many flip, within how many tokens, and flips per 1,000 tokens")
    print(f"{'':8} {'nats':>5} {'chunk':>5} {'flipped':>7} {'tokens':>6} {'rate':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for sharpness in options.sharpness:
            entropy, found = measure(dtype, sharpness, options.rows, options.max_new_tokens)
            for size, (flipped, tokens) in found.items():
                name, rate = str(dtype).removeprefix("torch."), 1000 * flipped / tokens
                print(f"{name:8} {entropy:5.2f} {size:5d} {flipped:7d} {tokens:6d} {rate:6.2f}", flush=True)


if __name__ == "__main__":
    main()
