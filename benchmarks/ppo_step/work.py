"""The work that every engine is given: sizes, model files, prompts, and lengths that responses must have."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PAD, EOS, FIRST_WORD = 0, 1, 2


@dataclass(frozen=True)
class Work:
    """One PPO iteration: ``rollouts`` prompts of ``prompt`` tokens, responses of at most ``response``."""

    name: str
    hidden: int
    layers: int
    vocab: int
    rollouts: int
    prompt: int
    response: int
    epochs: int = 4
    minibatches: int = 4
    natural: bool = False  # responses of long-tailed lengths instead of the full length
    # What fits into memory, where all at once do not: sequences a backward, and a forward of the peer without one.
    backward: int | None = None
    forward: int | None = None

    @property
    def heads(self) -> int:
        return max(1, self.hidden // 64)

    @property
    def minibatch(self) -> int:
        return self.rollouts // self.minibatches

    def lengths(self, iteration: int) -> list[int]:
        """Response tokens of each row, EOS included.

        Natural lengths are drawn once and kept: log-normal (sigma 0.8, median 0.3 of the limit, cut at the limit),
        the shape of the lengths in public chat logs, with a mean of about 0.4 of the limit.
        """
        if not self.natural:
            return [self.response] * self.rollouts
        rng = random.Random(iteration)
        drawn = (rng.lognormvariate(0, 0.8) * 0.3 * self.response for _ in range(self.rollouts))
        return [min(self.response, max(2, round(length))) for length in drawn]


SMALL = dict(hidden=256, layers=4, vocab=4096, rollouts=64, prompt=32, response=64)
LARGE = dict(hidden=512, layers=8, vocab=16384, rollouts=32, prompt=64, response=128)
BILLION = dict(hidden=2048, layers=18, vocab=32000, rollouts=256, prompt=256, response=256, backward=16, forward=64)
WORKS = {
    work.name: work
    for work in (
        Work("small-fixed", **SMALL),
        Work("small-natural", **SMALL, natural=True),
        Work("large-fixed", **LARGE),
        Work("large-natural", **LARGE, natural=True),
        # For a GPU of 80 GB or more.
        Work("gpu-1b-fixed", **BILLION),
        Work("gpu-1b-natural", **BILLION, natural=True),
        # The same code on next to nothing, to see it run.
        Work("tiny-natural", 64, 2, 64, 16, 8, 16, natural=True, backward=2, forward=8),
    )
}


def prepare(work: Work, folder: Path, seed: int = 0) -> None:
    """Write what all engines start from.

    ``policy/`` (a Llama), ``reward/`` (this package's reward model), ``reward_trl/`` (the same weights as a
    sequence classifier), a tokenizer of one token a word, ``prompts.json`` and ``work.json``.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

    from chatrlhf.data.encoder import Encoder
    from chatrlhf.data.templates import get_template
    from chatrlhf.models.reward_model import RewardModel, RewardScorer
    from chatrlhf.models.scalar_head import ScalarHead

    words = ["<pad>", "<eos>"] + [f"w{i}" for i in range(FIRST_WORD, work.vocab)]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=work.vocab,
        hidden_size=work.hidden,
        intermediate_size=round(work.hidden * 2.6875),
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.heads,
        max_position_embeddings=work.prompt + work.response,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    config.num_labels = 1
    classifier = LlamaForSequenceClassification(config)
    classifier.save_pretrained(folder / "reward_trl")
    tokenizer.save_pretrained(folder / "reward_trl")
    head = ScalarHead(work.hidden)
    with torch.no_grad():
        head.out.weight.copy_(classifier.score.weight)
        head.out.bias.zero_()
    encoder = Encoder(tokenizer, get_template("raw"), work.prompt + work.response)
    (folder / "reward").mkdir()
    RewardScorer(RewardModel(classifier.model, head), encoder).save(folder / "reward")
    rng = random.Random(seed)
    prompts = [
        " ".join(f"w{rng.randrange(FIRST_WORD, work.vocab)}" for _ in range(work.prompt))
        for _ in range(4 * work.rollouts)
    ]
    (folder / "prompts.json").write_text(json.dumps([{"user_input": prompt} for prompt in prompts]), encoding="utf-8")
    (folder / "work.json").write_text(json.dumps(asdict(work)), encoding="utf-8")


def read_work(folder: Path) -> Work:
    return Work(**json.loads((folder / "work.json").read_text(encoding="utf-8")))


def report(iterations: list[dict[str, float]], rss_after_imports: int, moved: float) -> None:
    """The line of JSON that the driver reads: seconds by phase and tokens of each iteration, peak memory, `moved`.

    Peak memory is a GPU's, where there is one, or this process's behind its imports.
    """
    import resource

    import torch

    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - rss_after_imports
    print(json.dumps({"iterations": iterations, "peak_bytes": peak, "moved": moved}), flush=True)


def moved(trained: dict[str, Any], folder: Path) -> float:
    """The share of the policy's weights that are not what they were: near 1, unless steps were lost to rounding."""
    from safetensors.torch import load_file

    before = load_file(folder / "policy" / "model.safetensors")
    changed = sum(
        int((trained[name].cpu().float() != before[name].to(trained[name].dtype).float()).sum()) for name in before
    )
    return changed / sum(tensor.numel() for tensor in before.values())


def rss() -> int:
    """Resident bytes now."""
    import psutil

    return psutil.Process().memory_info().rss
