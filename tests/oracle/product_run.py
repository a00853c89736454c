"""A small run of every stage, as questions to the oracle, each beside what the run itself computed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import CAUSAL, VOCAB
from small_run import records
from tiny import flan_t5
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chatrlhf import load_config, run
from chatrlhf.models.tokenizer import train_tokenizer
from chatrlhf.rl.prompts import step_seed
from chatrlhf.rl.scoring import Likelihoods, Scorer
from chatrlhf.trainers.ppo import PPOTrainer
from chatrlhf.types import Rollout

FAMILIES = (*CAUSAL, "Flan-T5")
METHODS = ("full", "LoRA")
TEMPLATES = ("chatllama", "hh", "stable_vicuna", "airoboros", "orca", "raw")
OPENED = ("LLaMA", "Mistral", "Gemma", "Gemma 2", "Gemma 3", "Mixtral")  # whose tokenizers put BOS before a text
SEED, STEPS = 5, 3
COLD = 1e-4  # a temperature at which the likeliest token has all of the probability
SAMPLING = {
    "temperature": 0.8,
    "min_new_tokens": 2,
    "max_new_tokens": 8,
    "forbidden_tokens": [70, 71, 72],
    "max_length": 320,
}

# A word follows no word where a prompt meets its reply: any tokenizer parts them there.
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = ("Hello there?", "What is new?", "Who is it, and why?", "See you!", "Where to, in 2 days?", "Thank you.")
EARLIER = [{"role": "user", "content": "Good day!"}, {"role": "assistant", "content": "And to you."}]


@dataclass
class Asked:
    """A question, what the run has said, and which part of the oracle's answer that is compared with."""

    quantity: str
    question: dict[str, Any]
    said: Any
    part: Callable[[Any], Any] = lambda answer: answer


@dataclass
class Case:
    """What one family is made of."""

    family: str
    method: str

    @property
    def number(self) -> int:
        return FAMILIES.index(self.family)

    @property
    def template(self) -> str:
        return TEMPLATES[self.number % len(TEMPLATES)]

    @property
    def pairs(self) -> bool:
        """Whether its reward model learns from preferences, and not from scores."""
        return (self.number + METHODS.index(self.method)) % 2 == 1


# ----- what a user brings


def conversations(number: int, first: int = 0) -> list[list[dict[str, str]]]:
    """Dialogues with and without a system text and earlier turns; no two are the same."""
    made = []
    for i in range(first, first + number):
        before = [[], [SYSTEM], EARLIER, [SYSTEM, *EARLIER]][i % 4]
        asked = {"role": "user", "content": f"{i}: {ASKED[i % len(ASKED)]}"}
        said = {"role": "assistant", "content": f"Well, {i}." if i % 3 else "No."}
        made.append([*before, asked, said])
    return made


TRAIN, HELD_OUT = conversations(12), conversations(6, first=12)


def judged(rows: list[list[dict[str, str]]], pairs: bool) -> list[dict[str, Any]]:
    if not pairs:
        return [{"messages": row, "score": i % 3 + 0.5} for i, row in enumerate(rows)]
    bad = {"role": "assistant", "content": "Nonsense, nonsense."}
    return [{"chosen": row, "rejected": [*row[:-1], bad]} for row in rows]


def write_files(folder: Path) -> None:
    for name, rows in (("train", TRAIN), ("held_out", HELD_OUT)):
        files = {
            "actor": [{"messages": row} for row in rows],
            "scores": judged(rows, pairs=False),
            "pairs": judged(rows, pairs=True),
            "prompts": [{"prompt": row[:-1]} for row in rows],
        }
        for kind, content in files.items():
            (folder / f"{kind}_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    peft = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all"}
    (folder / "peft.yaml").write_text(yaml.safe_dump(peft), encoding="utf-8")


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that opens or closes a text as the family's does."""
    texts = [message["content"] for row in TRAIN for message in row]
    tokenizer = train_tokenizer(texts, VOCAB)
    if family == "Flan-T5":
        closed = TemplateProcessing(single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)])
        tokenizer.backend_tokenizer.post_processor = closed
    if family in OPENED:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        opened = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = opened
    return tokenizer


def write_base(family: str, folder: Path) -> bool:
    """A model with random weights; returns whether it has dropout, so that what it computes in training is random."""
    torch.manual_seed(0)
    tokenizer = tokenizer_for(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if family == "Flan-T5":
        sizes = dict(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64)
        model = flan_t5(**sizes, **ids, decoder_start_token_id=ids["pad_token_id"])
    else:
        config = type(CAUSAL[family]).from_dict(CAUSAL[family].to_dict() | ids)
        config.update({"bos_token_id": tokenizer.bos_token_id, "vocab_size": len(tokenizer)})
        config.update({"max_position_embeddings": SAMPLING["max_length"]})
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rates = (value for name, value in model.config.to_dict().items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def configuration(case: Case, files: Path, base: Path, out: Path) -> Any:
    """All rows in one batch, so that every step's loss is over all of them; microbatches where nothing depends on it."""
    stage = {"batch_size": len(TRAIN), "micro_batch_size": 4, "epochs": STEPS, "lr": 1e-2, "checkpoint_steps": 1}
    stage |= {"n_checkpoints_to_keep": STEPS, "max_sequence_length": SAMPLING["max_length"], "precision": "fp32"}
    stage |= {"peft_enable": case.method == "LoRA"}
    experts = case.family == "Mixtral"  # whose balance is over the rows of a backward
    kind = "pairs" if case.pairs else "scores"
    return load_config(
        {
            "seed": SEED,
            "num_threads": 1,
            "output_dir": str(out),
            "actor_config": stage
            | {
                "model": str(base),
                "template": case.template,
                "micro_batch_size": None if experts else 4,
                "peft_config_path": str(files / "peft.yaml"),
                "train_dataset_path": str(files / "actor_train.json"),
                "validation_dataset_path": str(files / "actor_held_out.json"),
            },
            "reward_config": stage
            | {
                "checkpoint_steps": 100,
                "model_head_hidden_size": 16 if case.number % 3 == 0 else None,
                "train_dataset_path": str(files / f"{kind}_train.json"),
                "validation_dataset_path": str(files / f"{kind}_held_out.json"),
            },
            "critic_config": {"peft_enable": case.method == "LoRA"},
            "trainer_config": {
                "examples_path": str(files / "prompts_train.json"),
                "validation_examples_path": str(files / "prompts_held_out.json"),
                "num_rollouts": len(TRAIN),
                "total_episodes": 2 * len(TRAIN),
                "batch_size": len(TRAIN) // 2,
                "ppo_epochs": 2,
                "actor_lr": 1e-2,
                "critic_lr": 1e-2,
                "precision": "fp32",
                "gen_kwargs": {name: value for name, value in SAMPLING.items() if name != "max_length"},
            },
        }
    )


# ----- the run, and what is asked about it


@contextmanager
def watched() -> Iterator[tuple[list[PPOTrainer], list[tuple[Rollout, torch.Tensor, Likelihoods]]]]:
    """The trainer of an RL stage that runs inside, and every rollout that it scored, in their order."""
    trainers, rollouts = [], []
    train, read = PPOTrainer.train, Scorer.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer, "train", lambda self, *args: trainers.append(self) or train(self, *args))
        patch.setattr(Scorer, "read", lambda self, *args: rollouts.append(read(self, *args)) or rollouts[-1])
        yield trainers, rollouts


def questions(case: Case, folder: Path) -> list[Asked]:
    """Run all stages in ``folder`` and ask for everything that they computed."""
    base, out = folder / "base", folder / "run"
    write_files(folder)
    dropout = write_base(case.family, base)
    with watched() as (trainers, rollouts):
        run(configuration(case, folder, base, out))
    metrics = {(row["stage"], row["step"]): row for row in _merged(records(out, "metrics.jsonl"))}
    asked = [*sft_losses(out, base, metrics, dropout), *reward_scores(case, out, metrics)]
    asked += rl_rollouts(out, metrics, rollouts)
    return [*asked, greedy_rollout(trainers[-1], out)]


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a stage and step: losses of training and of evaluation are logged apart."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        merged.setdefault((row["stage"], row["step"]), {}).update(row)
    return list(merged.values())


def sft_losses(out: Path, base: Path, metrics: dict, dropout: bool) -> list[Asked]:
    """The loss of each step by the weights before it, and the held-out loss before the first and after the last."""
    weights = [base, *(out / "checkpoints" / "ACTOR" / f"step-{step:06d}" for step in range(1, STEPS)), out / "actor"]

    def loss(folder: Path, rows: list, said: float) -> Asked:
        question = {"ask": "sft_loss", "folder": str(folder), "conversations": rows, "ids_of": str(out / "actor")}
        return Asked("SFT loss", question, said)

    asked = [loss(weights[step], HELD_OUT, metrics["ACTOR", step]["loss/eval"]) for step in range(STEPS + 1)]
    if not dropout:
        asked += [loss(weights[step], TRAIN, metrics["ACTOR", step + 1]["loss/train"]) for step in range(STEPS)]
    return asked


def reward_scores(case: Case, out: Path, metrics: dict) -> list[Asked]:
    """Scores of whole conversations, and what the last evaluation of the REWARD stage made of them."""
    rows = [row for each in judged(HELD_OUT, case.pairs) for row in (each.get("messages"), each.get("chosen"), each.get("rejected")) if row]
    settings = json.loads((out / "reward" / "reward_model.json").read_text())
    replies = [{"conversation": row, "finished": True} for row in rows]
    question = {"ask": "scores", "folder": str(out / "reward"), "replies": replies}
    last = metrics["REWARD", STEPS]

    def evaluated(scores: list[float]) -> dict[str, float]:
        if case.pairs:
            margins = [(a - b) / settings["scale"] for a, b in zip(scores[::2], scores[1::2], strict=True)]
            return {"loss/eval": statistics.fmean(math.log1p(math.exp(-margin)) for margin in margins)}
        given = [row["score"] for row in judged(HELD_OUT, pairs=False)]
        squares = statistics.fmean((a - b) ** 2 for a, b in zip(scores, given, strict=True))
        return {"loss/eval": squares / settings["scale"] ** 2, "reward/rmse": math.sqrt(squares)}

    return [Asked("reward", question, {name: last[name] for name in evaluated([0.0] * len(rows))}, evaluated)]


def rl_rollouts(out: Path, metrics: dict, rollouts: list) -> list[Asked]:
    """The first and the last rollouts of held-out prompts and the first of training, with all that was made of them.

    Before the first update policy and reference are the fine-tuned actor and the critic, where it starts from the
    reward model, is that; behind the last update they are the folders that the run left.
    """
    first = "actor", "reward"
    asked = []
    for (policy, critic), seed, step, prefix, (rollout, scores, read) in (
        (first, step_seed(SEED, 0, "held-out"), 0, "eval/", rollouts[0]),
        (first, step_seed(SEED, 0, "rollout"), 1, "", rollouts[1]),
        (("actor_rl", "critic"), step_seed(SEED, 0, "held-out"), 2, "eval/", rollouts[-1]),
    ):
        prompts = [_messages(prompt.turns[-1].text) for prompt in rollout.prompts.prompts]
        replies = _rows(rollout.response_ids, rollout)
        is_copy = critic == "reward" and not any(map(any, _rows(read.values, rollout)))
        question = {
            "ask": "rollout",
            "policy": str(out / policy),
            "reference": str(out / "actor"),
            "critic": None if is_copy else str(out / critic),
            "prompts": prompts,
            "replies": replies,
            "seed": seed,
            "sampling": SAMPLING,
        }
        row = metrics["RL", step]

        def ask(quantity: str, said: Any, name: str, question: dict = question) -> None:
            asked.append(Asked(quantity, question, said, lambda answer: answer[name]))

        ask("log-probabilities", _rows(read.logprobs, rollout), "logprobs")
        ask("log-probabilities", _rows(rollout.sampling_logprobs, rollout), "logprobs")
        ask("log-probabilities", _rows(read.ref_logprobs, rollout), "reference_logprobs")
        ask("entropy", _rows(read.entropy, rollout), "entropy")
        ask("KL", row["eval/kl" if prefix else "kl/ref"], "kl")
        ask("rollouts", [[0.0] * len(reply) for reply in replies], "drawn")
        ask("rollouts", rollout.finished.tolist(), "finished")
        ask("rollouts", [True] * len(replies), "complete")
        if not is_copy:
            ask("values", _rows(read.values, rollout), "values")
        asked += _rewards(out, prompts, replies, rollout, scores, row["eval/reward" if prefix else "reward/mean"])
    return asked


def _rewards(out: Path, prompts: list, replies: list, rollout: Rollout, scores: torch.Tensor, mean: float) -> list[Asked]:
    """A policy's replies as the reward model read them."""
    given = [{"prompt": prompt, "reply_ids": reply} for prompt, reply in zip(prompts, replies, strict=True)]
    if json.loads((out / "reward" / "reward_model.json").read_text())["pooling"] == "start":
        # Prompt and reply are read as one text, which is encoded anew.
        given = [
            {"conversation": [*prompt, {"role": "assistant", "content": text}], "finished": finished}
            for prompt, text, finished in zip(prompts, rollout.completions, rollout.finished.tolist(), strict=True)
        ]
    question = {"ask": "scores", "folder": str(out / "reward"), "replies": given}
    return [Asked("reward", question, scores.tolist()), Asked("reward", question, mean, statistics.fmean)]


def _messages(asked: str) -> list[dict[str, str]]:
    """The prompt of the files whose last message says so."""
    return next(row[:-1] for row in (*TRAIN, *HELD_OUT) if row[-2]["content"] == asked)


def _rows(values: torch.Tensor, rollout: Rollout) -> list[list[Any]]:
    """Of [B, R] what is real, row by row."""
    return [row[mask].tolist() for row, mask in zip(values, rollout.response_mask, strict=True)]


def greedy_rollout(trainer: PPOTrainer, out: Path) -> Asked:
    """What the finished policy says at a temperature near 0."""
    engine = trainer.engine
    cold = replace(engine, distribution=replace(engine.distribution, temperature=COLD))
    rollout = cold.generate(trainer.held_out.prompts, seed=0)
    prompts = [row[:-1] for row in HELD_OUT]
    question = {"ask": "greedy", "folder": str(out / "actor_rl"), "prompts": prompts, "sampling": SAMPLING}
    return Asked("greedy", question, _rows(rollout.response_ids, rollout))
