"""Memory as it was planned against memory as it was: real runs on a CPU, each in a process of its own.

    python -m benchmarks.memory
    python -m benchmarks.memory --cases gpt2 llama --stages SFT REWARD

Models have random weights and at least 100 million of them. Measured is the peak of the process's resident memory less
what it was behind the imports; planned is the greatest phase of the plan, made from the configuration alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MiB = 2**20
PROMPT, RESPONSE = 96, 32

# By transformers' names. While `chatrlhf/tools/plan` was written GPT-2 alone was measured; the others came behind it.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict(model_type="gpt2"),
    "opt": dict(model_type="opt"),
    "llama": dict(
        model_type="llama",
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=32000,
        max_position_embeddings=512,
    ),
    "qwen2": dict(
        model_type="qwen2",
        hidden_size=640,
        intermediate_size=1792,
        num_hidden_layers=14,
        num_attention_heads=10,
        num_key_value_heads=2,
        vocab_size=65536,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
    "t5": dict(
        model_type="t5",
        d_model=640,
        d_ff=1792,
        d_kv=64,
        num_layers=8,
        num_heads=10,
        feed_forward_proj="gated-gelu",
        vocab_size=32128,
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
}
TRUNK = "RL, 2 blocks"
LORA = {"actor_config.peft_enable": True}
# Settings of a stage beside those of `configuration`.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "SFT": ("ACTOR", {}),
    "SFT by LoRA": ("ACTOR", LORA),
    "SFT, checkpointing": ("ACTOR", {"actor_config.gradient_checkpointing": True}),
    "REWARD": ("REWARD", {}),
    "RL, own critic": ("RL", {"reward_config.reward_fn": "benchmarks.memory:score"}),
    "RL, shared critic": ("RL", {"critic_config.model": "shared"}),
    "RL by LoRA": ("RL", {"critic_config.model": "shared", "trainer_config.precision": "bf16", **LORA}),
    TRUNK: ("RL", {"trainer_config.num_layers_unfrozen": 2}),
    "RL in bf16": ("RL", {"critic_config.model": "shared", "trainer_config.precision": "bf16"}),
}


@dataclass(frozen=True)
class Measured:
    """Bytes of a case."""

    planned: int
    phase: str
    measured: int

    @property
    def ratio(self) -> float:
        return self.planned / self.measured


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward that costs nothing."""
    return [float(len(completion)) for completion in completions]


def configuration(folder: Path, changes: dict[str, Any]) -> Any:
    """A short run on the model and the rows in ``folder``."""
    from chatrlhf.config import load_config

    rows = {"batch_size": 4, "max_sequence_length": PROMPT + RESPONSE, "over_length": "cut", "epochs": 1}
    tree = {
        "output_dir": str(folder / "run"),
        "num_threads": 1,
        "actor_config": {
            "model": str(folder / "model"),
            "train_dataset_path": str(folder / "actor.json"),
            "template": "{user_input}",
            "validation_fraction": 0.0,
            **rows,
        },
        "reward_config": {"train_dataset_path": str(folder / "reward.json"), "validation_fraction": 0.0, **rows},
        "trainer_config": {
            "examples_path": str(folder / "prompts.json"),
            "validation_fraction": 0.0,
            "total_episodes": 8,
            "num_rollouts": 8,
            "batch_size": 4,
            "ppo_epochs": 1,
            "precision": "fp32",
            "gen_kwargs": {"max_new_tokens": RESPONSE, "min_new_tokens": RESPONSE},
        },
    }
    return load_config(tree, changes)


def make(folder: Path, shape: dict[str, Any]) -> None:
    """A model with random weights, a tokenizer of bytes, a reward model, and rows that fill the context."""
    import torch
    from transformers import AutoConfig

    from chatrlhf.data.encoder import Encoder
    from chatrlhf.data.templates import get_template
    from chatrlhf.models.for_stages import pooling_for
    from chatrlhf.models.loading.backbone import backbone_of, language_model_class
    from chatrlhf.models.loading.tokenizer import train_tokenizer
    from chatrlhf.models.reward_model import RewardModel, RewardScorer
    from chatrlhf.models.scalar_head import ScalarHead, state_size

    torch.manual_seed(0)
    tokenizer = train_tokenizer([], 258)
    fields = dict(shape, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    settings = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = language_model_class(settings).from_config(settings)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    encoder = Encoder.of(tokenizer, get_template("{user_input}", tokenizer=tokenizer), PROMPT + RESPONSE)
    backbone = backbone_of(model)
    judge = RewardModel(backbone, ScalarHead(state_size(backbone)), pooling_for(backbone))
    reward = RewardScorer(judge, encoder)
    (folder / "run" / "reward").mkdir(parents=True)
    reward.save(folder / "run" / "reward")
    prompts = [f"{i:02d}" * (PROMPT // 2) for i in range(8)]
    reply = "x" * (RESPONSE + 8)
    rows = {
        "actor": [{"user_input": each, "completion": reply} for each in prompts],
        "reward": [
            {"user_input": each, "chosen": reply[: RESPONSE - 1], "rejected": reply[1:RESPONSE]} for each in prompts
        ],
        "prompts": [{"user_input": each} for each in prompts],
    }
    for name, content in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def measure(folder: Path, stage: str, changes: dict[str, Any]) -> int:
    """Peak memory of a run, in bytes, less what the imports took."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import psutil
    import trl.trainer.reward_trainer
    import trl.trainer.sft_trainer  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM  # noqa: F401

    import chatrlhf.pipeline
    import chatrlhf.stages.reward
    import chatrlhf.stages.sft  # noqa: F401

    config = configuration(folder, changes)
    # What a stage imports when it is there; classes that transformers makes when they are asked for, too.
    trl.SFTTrainer, trl.SFTConfig, trl.RewardTrainer, trl.RewardConfig  # noqa: B018
    before = psutil.Process().memory_info().rss
    chatrlhf.pipeline.run(config, type=stage)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def plan(folder: Path, stage: str, changes: dict[str, Any]) -> tuple[int, str]:
    """The plan's greatest phase: its bytes and its name."""
    from chatrlhf.tools.plan.run_plan import plan_run

    phases = [each for made in plan_run(configuration(folder, changes), [stage]).stages for each in made.phases]
    greatest = max(phases, key=lambda phase: phase.total)
    return greatest.total, f"{greatest.name} {greatest.parts}"


def _child(*words: str) -> Any:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.memory", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _case(shape: str, stages: list[str]) -> None:
    folder = Path(tempfile.mkdtemp(prefix="chatrlhf-memory-"))
    try:
        _child("--make", str(folder), "--shape", shape)
        for name in stages:
            if (shape, name) == ("t5", TRUNK):
                continue  # an encoder–decoder has no trunk that could be frozen
            found = Measured(
                *_child("--plan", str(folder), "--stage", name), _child("--run", str(folder), "--stage", name)
            )
            print(
                f"| {shape} | {name} | {found.planned / MiB:,.0f} | {found.measured / MiB:,.0f} | {found.ratio:.2f} |",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    for name in ("make", "plan", "run"):  # what a process of its own does
        parser.add_argument(f"--{name}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make(options.make, SHAPES[options.shape])
        print("{}")
    elif options.plan:
        print(json.dumps(plan(options.plan, *STAGES[options.stage])))
    elif options.run:
        print(json.dumps(measure(options.run, *STAGES[options.stage])))
    else:
        print("| model | stage | planned, MiB | measured, MiB | ratio |\n|---|---|---:|---:|---:|")
        for shape in options.cases:
            _case(shape, options.stages)


if __name__ == "__main__":
    main()
