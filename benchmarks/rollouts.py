"""Rollouts alone: this package's engine, as `--type RL` builds it, against transformers' `generate`.

    python -m benchmarks.rollouts --works small-fixed small-natural large-fixed large-natural

Both start from the same files, sample from the plain distribution (temperature 1, no top-k) and give responses of the
same lengths.
`generate` runs at the fastest of its precisions and attention kernels, found first, as one left-padded batch. The two
alternate in one process over the same prompts; the first of each is warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import chatrlhf.pipeline  # first: what it asks of PyTorch's threads is read when they are loaded

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from benchmarks.forced_lengths import ForcedLengths  # noqa: E402
from benchmarks.ppo_step.ours import settings  # noqa: E402
from benchmarks.ppo_step.work import EOS, PAD, WORKS, Work, prepare  # noqa: E402
from benchmarks.processes import alternating, cell  # noqa: E402
from chatrlhf.config import load_config  # noqa: E402
from chatrlhf.rl.ppo import PPOTrainer  # noqa: E402
from chatrlhf.types import PromptBatch  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KERNELS = ("sdpa", "eager")


class Built(Exception):
    """Carries the trainer out of the stage that has put it together."""


def our_trainer(work: Work, folder: Path, overrides: list[str]) -> PPOTrainer:
    """What `--type RL` would train with: caught before the first step, so nothing here can differ from it."""

    def caught(trainer: PPOTrainer, *args: Any) -> None:
        raise Built(trainer)

    train, PPOTrainer.train = PPOTrainer.train, caught
    try:
        with tempfile.TemporaryDirectory() as out:
            config = load_config(settings(work, folder, 1) | {"output_dir": out}, overrides)
            chatrlhf.pipeline.run(config, type="RL")
    except Built as built:
        return built.args[0]
    finally:
        PPOTrainer.train = train
    raise AssertionError("the RL stage came to its end without training")


def our_rollout(work: Work, trainer: PPOTrainer) -> Callable[[PromptBatch, list[int], int], Tensor]:
    """(prompts, lengths, seed) to real tokens of each row, [B]."""

    def generate(prompts: PromptBatch, lengths: list[int], seed: int) -> Tensor:
        limits = trainer.engine.limits
        if work.natural:
            given = torch.tensor(lengths)
            limits.per_row = lambda _: (given, given)  # on the instance: the class stays as it is
        return trainer.engine.generate(prompts, seed).lengths

    return generate


def peer_rollout(work: Work, model: Any) -> Callable[[PromptBatch, list[int], int], Tensor]:
    """The same by `generate`."""

    def generate(prompts: PromptBatch, lengths: list[int], seed: int) -> Tensor:
        torch.manual_seed(seed)
        width = prompts.input_ids.shape[1]
        sequences = model.generate(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask.long(),
            logits_processor=[ForcedLengths(lengths, work.response, width, EOS, (PAD,))],
            max_new_tokens=work.response,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
        return (sequences[:, width:] != PAD).sum(dim=1)

    return generate


def load_peer(folder: Path, precision: str, kernel: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder / "policy", dtype=PRECISIONS[precision], attn_implementation=kernel
    ).eval()


def compare(work: Work, pairs: int, overrides: list[str]) -> dict[str, Any]:
    """All timings of one piece of work."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(work, folder)
        trainer = our_trainer(work, folder, overrides)

        def timed(generate: Callable[..., Tensor], step: int) -> float:
            prompts, lengths = trainer.prompts.batch(step), work.lengths(step)
            began = time.perf_counter()
            made = generate(prompts, lengths, step)
            seconds = time.perf_counter() - began
            assert made.tolist() == lengths, "responses of other lengths than the work's"
            return seconds

        quick = {}
        for way in [(precision, kernel) for precision in PRECISIONS for kernel in KERNELS]:
            generate = peer_rollout(work, load_peer(folder, *way))
            quick[way] = min(timed(generate, step) for step in range(2))
        best = min(quick, key=quick.get)
        print(
            f"{work.name}: generate " + ", ".join(f"{' '.join(way)} {s:.2f} s" for way, s in quick.items()), flush=True
        )
        engines = {"ours": our_rollout(work, trainer), "generate": peer_rollout(work, load_peer(folder, *best))}
        found: dict[str, list[float]] = {engine: [] for engine in engines}
        for engine in alternating(list(engines), pairs + 1):
            found[engine].append(timed(engines[engine], len(found[engine])))
    tokens = [sum(work.lengths(step)) for step in range(1, pairs + 1)]
    return {
        "work": asdict(work),
        "peer": " ".join(best),
        "seconds": {engine: seconds[1:] for engine, seconds in found.items()},
        "tokens": tokens,
    }


def markdown(results: list[dict[str, Any]]) -> str:
    """The table for people."""
    lines = [
        "| work | ours, s (least–greatest) | generate, s (least–greatest) | at | times as fast | tokens/s, both |",
        "|---|---:|---:|---|---:|---:|",
    ]
    for result in results:
        ours, peer = result["seconds"]["ours"], result["seconds"]["generate"]
        ratio = statistics.median(peer) / statistics.median(ours)
        rates = [
            statistics.median(t / s for t, s in zip(result["tokens"], seconds, strict=True)) for seconds in (ours, peer)
        ]
        lines.append(
            f"| {result['work']['name']} | {cell(ours)} | {cell(peer)} | {result['peer']} | {ratio:.2f} | "
            f"{rates[0]:.0f}, {rates[1]:.0f} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts", description=__doc__.split("\n")[0])
    parser.add_argument("--works", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--pairs", type=int, default=7, help="measured rollouts of each, behind one of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="override our configuration")
    parser.add_argument("--json", type=Path, help="write all raw figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [compare(WORKS[name], options.pairs, options.set) for name in options.works]
    print(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
