"""The stand-in on a piece of work, from the same files as the others.

python -m benchmarks.trlx_standin.engine FOLDER ITERATIONS CHUNK_SIZE
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from benchmarks.ppo_step.work import EOS, PAD, Work, moved, read_work, report, rss  # noqa: E402
from benchmarks.trlx_standin.loop import Batch, Settings, StandIn  # noqa: E402
from benchmarks.trlx_standin.reward import even_words  # noqa: E402


def build(work: Work, folder: Path, chunk_size: int) -> tuple[StandIn, Batch]:
    """The loop over the work's policy, and all of its prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32, attn_implementation="eager")
    settings = Settings(
        max_new_tokens=work.response,
        chunk_size=chunk_size,
        batch_size=work.minibatch,
        ppo_epochs=work.epochs,
        lr=3e-6,
    )
    loop = StandIn(
        model,
        settings,
        even_words,
        decode=tokenizer.decode,
        encode=lambda text: tokenizer(text)["input_ids"],
        eos=EOS,
        pad=PAD,
    )
    texts = [row["user_input"] for row in json.loads((folder / "prompts.json").read_text(encoding="utf-8"))]
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    return loop, Batch(encoded["input_ids"], encoded["attention_mask"])


def main(folder: Path, iterations: int, chunk_size: int) -> None:
    after_imports = rss()
    work = read_work(folder)
    torch.manual_seed(0)
    loop, prompts = build(work, folder, chunk_size)
    found = []
    for i in range(iterations):
        rows = torch.arange(i * work.rollouts, (i + 1) * work.rollouts) % len(prompts.input_ids)
        stats = loop.iteration(Batch(prompts.input_ids[rows], prompts.attention_mask[rows]), work.lengths(i))
        phases = {phase: stats[phase] for phase in ("rollout", "score", "update")}
        found.append(phases | {"total": sum(phases.values()), "tokens": stats["tokens"]})
    report(found, after_imports, moved(loop.policy.model.state_dict(), folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
