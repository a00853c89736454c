"""TRL 1.12.0's PPOTrainer on a piece of work; runs in an environment of its own.

Responses keep their full length in its generate; its own truncation at EOS then makes the lengths, as it does for
its users. So that all engines train on the lengths given, each row's EOS is put where the work says, and an EOS
or pad that the untrained policy happened to draw elsewhere becomes another word.

    python benchmarks/ppo_step/trl_peer.py FOLDER ITERATIONS fp32|bf16|pure_bf16
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

from benchmarks.ppo_step.work import EOS, FIRST_WORD, Work, moved, read_work, report, rss  # noqa: E402


def now() -> float:
    """Seconds, once all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds of each phase; the end of an iteration is the end of its logging."""

    def __init__(self, work: Work) -> None:
        self.work, self.found, self.began = work, [], 0.0
        self.generated = self.scored = 0.0

    def on_train_begin(self, *args, **kwargs):
        self.began = now()

    def on_step_end(self, *args, **kwargs):
        ended = now()
        self.found.append(
            {
                "rollout": self.generated - self.began,
                "score": self.scored - self.generated,
                "update": ended - self.scored,
                "total": ended - self.began,
                "tokens": sum(self.work.lengths(len(self.found))),
            }
        )

    def mark_start(self):
        self.began = now()


def put_lengths(clock: Clock) -> None:
    """Wrap TRL's generation: the same tokens, with EOS where the work has it; and take the time."""
    generate, whiten = ppo_trainer.batch_generation, ppo_trainer.masked_whiten

    def batch_generation(model, queries, *args):
        clock.mark_start()
        sequences, logits = generate(model, queries, *args)
        response = sequences[:, queries.shape[1] :]
        response[response < FIRST_WORD] = FIRST_WORD
        if clock.work.natural:
            for row, length in enumerate(clock.work.lengths(len(clock.found))):
                response[row, length - 1] = EOS
        clock.generated = now()
        return sequences, logits

    def masked_whiten(*args, **kwargs):
        whitened = whiten(*args, **kwargs)  # the advantages' is the last thing before the update
        clock.scored = now()
        return whitened

    ppo_trainer.batch_generation, ppo_trainer.masked_whiten = batch_generation, masked_whiten


def main(folder: Path, iterations: int, precision: str) -> None:
    after_imports = rss()
    work = read_work(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    dtype = torch.bfloat16 if precision == "pure_bf16" else torch.float32
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=dtype) for _ in range(2))
    value, reward = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward_trl", num_labels=1, dtype=dtype)
        for _ in range(2)
    )
    texts = [row["user_input"] for row in json.loads((folder / "prompts.json").read_text())]
    prompts = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    with tempfile.TemporaryDirectory() as out:
        arguments = PPOConfig(
            output_dir=out,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            bf16=precision == "bf16",
            learning_rate=3e-6,
            # Its optimizer steps once in gradient_accumulation_steps backwards, so minibatches are made this way. Where
            # they do not fit into memory, it steps less often than it should: the same products, fewer steps.
            per_device_train_batch_size=work.backward or work.rollouts,
            gradient_accumulation_steps=work.rollouts // (work.backward or work.rollouts),
            num_mini_batches=work.minibatches,
            num_ppo_epochs=work.epochs,
            total_episodes=iterations * work.rollouts,
            local_rollout_forward_batch_size=work.forward or work.rollouts,
            response_length=work.response,
            temperature=1.0,
            stop_token=None,
            num_sample_generations=0,
            gradient_checkpointing=False,
        )
        clock = Clock(work)
        put_lengths(clock)
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=reward,
            value_model=value,
            train_dataset=prompts,
            eval_dataset=prompts.select(range(work.rollouts)),
            callbacks=[clock],
        )
        trainer.stop_token_id = EOS if work.natural else None
        stdout, sys.stdout = sys.stdout, sys.stderr
        trainer.train()
        sys.stdout = stdout
        changed = moved(policy.state_dict(), folder)
    report(clock.found, after_imports, changed)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
