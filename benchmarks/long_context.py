"""What stretched positions cost and what long text repairs: the shape of airoboros' table, on a play.

    python -m benchmarks.long_context --text input.txt      # tinyshakespeare; three seeds

A Llama with 256 positions is created on the fly and trained on rows of 256 tokens by the PRETRAIN stage: the base. Its
positions are divided by 8, and it is fine-tuned on speeches and their answers by the ACTOR stage, at 256 tokens: as it
is, and behind PRETRAIN on rows of 2,048 tokens. `chatrlhf eval perplexity` sets these beside the base on the last tenth
of the play, which nothing was trained on. Printed are the tables of each seed and their mean, and whether the claims
hold for each; where one does not, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from chatrlhf import load_config, run
from chatrlhf.tools.evaluate.cli import main as evaluate

LENGTH, FACTOR = 256, 8
CONTEXTS = (32, 64, 128, 256, 512, 1024, 2048)
STRIDE, WINDOWS = 16, 128
HELD_OUT = 0.1  # of the play, its end
COLUMNS = ("base", "stretched", "stretched, SFT", "stretched, PRETRAIN, SFT")
SCALING = {"type": "linear", "factor": FACTOR}
# A model of under a million weights on half a million tokens: some seven passes, before it learns them by heart.
TINY = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": LENGTH,
}
USUAL = {
    "weight_decay": 0.1,
    "betas": [0.9, 0.95],
    "precision": "bf16",  # autocast, which saves a third of the time here
    "checkpoint_steps": 100_000,
    "iteration_per_print": 50,
}
BASE = {"max_sequence_length": LENGTH, "steps": 800, "batch_size": 16, "lr": 3e-3, "warmup_steps": 50}
LONG = {"max_sequence_length": LENGTH * FACTOR, "steps": 300, "batch_size": 4, "lr": 1e-3, "warmup_steps": 10}
SFT = {"max_sequence_length": LENGTH, "batch_size": 16, "sort_by_length": True, "lr": 5e-5, "warmup_steps": 10}

Table = dict[str, dict[int, float]]  # column -> context -> perplexity


def write_data(play: str, folder: Path) -> None:
    """The play's beginning as text and as speeches with their answers, and its end."""
    end = play.index("\n\n", round(len(play) * (1 - HELD_OUT)))
    (folder / "train.txt").write_text(play[:end], encoding="utf-8")
    (folder / "held_out.txt").write_text(play[end:].lstrip(), encoding="utf-8")
    (folder / "speeches.jsonl").write_text(
        "".join(f"{json.dumps(row)}\n" for row in answers(play[:end])), encoding="utf-8"
    )


def answers(play: str) -> Iterator[dict[str, str]]:
    """Of each two speeches in succession the first, with the second's speaker, as prompt for the second."""
    speeches = play.split("\n\n")
    for asked, answer in zip(speeches, speeches[1:], strict=False):
        name, colon, said = answer.partition(":\n")
        if colon and said.strip():
            yield {"user_input": f"{asked}\n\n{name}:\n", "completion": said}


def train(data: Path, folder: Path, seed: int, threads: int) -> dict[str, str]:
    """Everything of one seed; the model of each column, as `eval perplexity` takes it."""

    def config(name: str, **sections: dict[str, Any]) -> Any:
        common = {"seed": seed, "num_threads": threads, "output_dir": str(folder / name)}
        return load_config({**common, **sections})

    text = {"train_dataset_path": str(data / "train.txt"), "validation_fraction": 0.02, **USUAL}
    speeches = {"train_dataset_path": str(data / "speeches.jsonl"), "validation_fraction": 0.02, **USUAL}
    made = config("base", actor_config={"model": "tiny", "tiny": TINY}, pretrain_config=text | BASE)
    base = str(run(made, type="PRETRAIN").stages["PRETRAIN"].checkpoint)
    actor = {"model": base, "rope_scaling": SCALING, "template": "raw", **speeches, **SFT}
    tuned = run(config("sft", actor_config=actor), type="ACTOR")
    both = config("long", actor_config=actor, pretrain_config=text | LONG)
    run(both, type="PRETRAIN")
    behind = run(both, type="ACTOR")
    stretched = f"{base}@{SCALING['type']}:{FACTOR}"
    models = (base, stretched, *(str(each.stages["ACTOR"].checkpoint) for each in (tuned, behind)))
    return dict(zip(COLUMNS, models, strict=True))


def climb(models: dict[str, str], data: Path, folder: Path) -> Table:
    """Perplexities on the end of the play."""
    words = [
        "perplexity",
        str(data / "held_out.txt"),
        "--models",
        *models.values(),
        "--contexts",
        ",".join(map(str, CONTEXTS)),
    ]
    words += ["--stride", str(STRIDE), "--windows", str(WINDOWS), "--json", str(folder / "ladder.json")]
    evaluate(words)
    found = json.loads((folder / "ladder.json").read_text(encoding="utf-8"))["models"]
    rungs = ({int(context): value for context, value in each["perplexity"].items()} for each in found)
    return dict(zip(models, rungs, strict=True))


def mean(tables: list[Table]) -> Table:
    """The geometric mean of perplexities."""
    return {
        column: {each: statistics.geometric_mean(table[column][each] for table in tables) for each in CONTEXTS}
        for column in COLUMNS
    }


def claims(table: Table) -> list[tuple[str, bool, str]]:
    """What the table has to show, whether it does, and the figure that says so."""
    base, _, tuned, last = (table[column] for column in COLUMNS)
    far = LENGTH * FACTOR
    worse = base[far] / base[LENGTH]
    rise = max(last[b] / last[a] for a, b in combinations(CONTEXTS, 2))
    cost = max(last[each] / base[each] for each in CONTEXTS if each <= LENGTH) - 1
    against = last[far] / tuned[far]
    return [
        (f"the base at {far:,} has twice its perplexity at {LENGTH} or more", worse >= 2, f"{worse:.2f} times"),
        (f"the last column does not rise up to {far:,}, but for 1 %", rise <= 1.01, f"{rise - 1:+.1%} at the most"),
        (f"up to {LENGTH} it costs 25 % or less", cost <= 0.25, f"{cost:+.1%} at the most"),
        (f"at {far:,} it is no worse than SFT alone", against <= 1, f"{against:.3f} of it"),
    ]


def markdown(table: Table) -> str:
    """The table for people."""
    lines = [f"| context (tokens) | {' | '.join(COLUMNS)} |", "|---:" * (len(COLUMNS) + 1) + "|"]
    for context in CONTEXTS:
        lines.append(f"| {context:,} | " + " | ".join(f"{table[column][context]:.2f}" for column in COLUMNS) + " |")
    return "\n".join(lines)


def report(title: str, table: Table) -> bool:
    """Print a table and its claims; whether all hold."""
    print(f"\n{title}\n\n{markdown(table)}\n")
    found = claims(table)
    for claim, holds, figure in found:
        print(f"{'holds' if holds else 'FAILS'}: {claim} ({figure})", flush=True)
    return all(holds for _, holds, _ in found)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_context", description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare's input.txt, or another play")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--keep", type=Path, help="leave the models there; without: nothing is left")
    options = parser.parse_args()
    began = time.perf_counter()
    tables = []
    with tempfile.TemporaryDirectory() as name:
        data = options.keep or Path(name)
        data.mkdir(parents=True, exist_ok=True)
        write_data(options.text.read_text(encoding="utf-8"), data)
        for seed in options.seeds:
            folder = data / f"seed-{seed}"
            tables.append(climb(train(data, folder, seed, options.threads), data, folder))
    held = [report(f"seed {seed}", table) for seed, table in zip(options.seeds, tables, strict=True)]
    held.append(report(f"mean of {len(tables)} seeds", mean(tables)))
    print(f"{time.perf_counter() - began:.0f} s")
    return 0 if all(held) else 1


if __name__ == "__main__":
    raise SystemExit(main())
