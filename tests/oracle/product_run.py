"""A small run of every stage, as questions to the oracle, each beside what the run itself computed."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import CAUSAL, VOCAB
from small_run import records
from tiny import flan_t5
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    PreTrainedTokenizerFast,
)

from chatrlhf import load_config, run
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.scoring import Likelihoods, Scorer
from chatrlhf.runtime.seeding import step_seed
from chatrlhf.types import Rollout

FAMILIES = (*CAUSAL, "Flan-T5")
ENCODER = "DeBERTa-v3"  # reads replies for a Llama
TEMPLATES = ("chatllama", "hh", "stable_vicuna", "airoboros", "orca", "raw")
OPENED = ("LLaMA", "Mistral", "Gemma", "Gemma 2", "Gemma 3", "Mixtral", ENCODER)  # by BOS are the texts of these
CLOSED = ("Flan-T5", ENCODER)  # and by EOS those of these
SEED, STEPS = 5, 3
COLD = 1e-4  # a temperature at which the likeliest token has all of the probability
SAMPLING = {
    "temperature": 0.8,
    "min_new_tokens": 2,
    "max_new_tokens": 8,
    "forbidden_tokens": [70, 71, 72],
    "max_length": 320,
}

DEBERTA = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    relative_attention=True,
    position_biased_input=False,
    pos_att_type=["p2c", "c2p"],
    type_vocab_size=0,
    initializer_range=0.3,
    pooler_hidden_size=32,
)

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


@dataclass(frozen=True)
class Case:
    """A family and how its models are trained; so that all of them meet, templates and rewards change from one to next.

    Args:
        family: of the policy and the reward model; `ENCODER` is a reward model's alone.
        lora: whether adapters are trained, and not the weights themselves.
        sentencepiece: whether the tokenizer is of Llama 2's kind, to which the start of a text is special.
    """

    family: str
    lora: bool = False
    sentencepiece: bool = False

    @property
    def name(self) -> str:
        return self.family + "/LoRA" * self.lora + "/SentencePiece" * self.sentencepiece

    @property
    def policy(self) -> str:
        return "LLaMA" if self.family == ENCODER else self.family

    @property
    def number(self) -> int:
        return FAMILIES.index(self.policy)

    @property
    def template(self) -> str:
        return TEMPLATES[self.number % len(TEMPLATES)]

    @property
    def pairs(self) -> bool:
        """Whether its reward model learns from preferences, and not from scores."""
        return (self.number + self.lora) % 2 == 1

    @property
    def experts(self) -> bool:
        """Whether a batch's loss is not its rows' alone: the balance of experts is that of a whole batch."""
        return self.policy == "Mixtral"

    @property
    def held_out(self) -> list[list[dict[str, str]]]:
        """Held-out rows of the ACTOR stage."""
        return HELD_OUT if self.experts else TWO_BATCHES

    @property
    def critic_judges(self) -> bool:
        """Whether its critic starts as the reward model; otherwise it starts at 0."""
        return self.family not in (ENCODER, "Flan-T5")


CASES = [Case(family, lora) for lora in (False, True) for family in FAMILIES]
CASES += [Case(ENCODER), Case("LLaMA", sentencepiece=True)]


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
TWO_BATCHES = [*HELD_OUT, *conversations(14, first=18)]  # held-out rows that one batch has no room for


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
    rows = [{"messages": row} for row in TWO_BATCHES]
    (folder / "two_batches.json").write_text(json.dumps(rows), encoding="utf-8")
    peft = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all"}
    (folder / "peft.yaml").write_text(yaml.safe_dump(peft), encoding="utf-8")


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that opens or closes a text as the family's does."""
    texts = [message["content"] for row in TRAIN for message in row]
    tokenizer = train_tokenizer(texts, VOCAB)
    if family in OPENED:
        tokenizer.add_special_tokens({"bos_token": "<s>"})
    around = f"{tokenizer.bos_token or ''} $A {tokenizer.eos_token if family in CLOSED else ''}".strip()
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in tokenizer.all_special_tokens]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=around, special_tokens=special)
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """As transformers makes Llama 2's: a blank before the first word only, and bytes for what has no token."""
    model = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=special, show_progress=False)
    model.train_from_iterator([message["content"] for row in TRAIN for message in row], trainer)
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    blanks = decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    model.decoder = decoders.Sequence(list(blanks))
    model.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=model, **names, clean_up_tokenization_spaces=False)


def write_model(family: str, folder: Path, sentencepiece: bool = False) -> bool:
    """A model with random weights; returns whether it has dropout, so that what it computes in training is random."""
    torch.manual_seed(0)
    tokenizer = sentencepiece_tokenizer() if sentencepiece else tokenizer_for(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids |= {"bos_token_id": tokenizer.bos_token_id, "vocab_size": len(tokenizer)}
    if family == "Flan-T5":
        model = flan_t5(d_model=32, d_kv=16, d_ff=64, **ids, decoder_start_token_id=tokenizer.pad_token_id)
    elif family == ENCODER:
        config = DebertaV2Config(**DEBERTA, **ids, max_position_embeddings=SAMPLING["max_length"], num_labels=1)
        model = AutoModelForSequenceClassification.from_config(config)
    else:
        config = type(CAUSAL[family]).from_dict(CAUSAL[family].to_dict())
        config.update(ids | {"max_position_embeddings": SAMPLING["max_length"]})
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rates = (value for name, value in model.config.to_dict().items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def configuration(case: Case, folder: Path) -> Any:
    """A run over what is in ``folder``; all rows are one batch, so that each step's loss is over all of them."""
    stage = {"batch_size": len(TRAIN), "micro_batch_size": 4, "epochs": STEPS, "lr": 1e-2, "checkpoint_steps": 1}
    stage |= {"n_checkpoints_to_keep": STEPS, "max_sequence_length": SAMPLING["max_length"], "precision": "fp32"}
    stage |= {"peft_enable": case.lora}
    kind = "pairs" if case.pairs else "scores"
    return load_config(
        {
            "seed": SEED,
            "guards_config": {"allow_untrained_actor": True},  # three steps are few
            "num_threads": 1,
            "output_dir": str(folder / "run"),
            "actor_config": stage
            | {
                "model": str(folder / "base"),
                "template": case.template,
                "micro_batch_size": None if case.experts else 4,
                "peft_config_path": str(folder / "peft.yaml"),
                "train_dataset_path": str(folder / "actor_train.json"),
                "validation_dataset_path": str(
                    folder / ("actor_held_out.json" if case.experts else "two_batches.json")
                ),
            },
            "reward_config": stage
            | {
                "model": str(folder / "judge") if case.family == ENCODER else "actor",
                "fresh_head": case.family == ENCODER,
                "checkpoint_steps": 100,
                "model_head_hidden_size": 16 if case.number % 3 == 0 else None,
                "train_dataset_path": str(folder / f"{kind}_train.json"),
                "validation_dataset_path": str(folder / f"{kind}_held_out.json"),
            },
            "critic_config": {"peft_enable": case.lora},
            "trainer_config": {
                "examples_path": str(folder / "prompts_train.json"),
                "validation_examples_path": str(folder / "prompts_held_out.json"),
                "num_rollouts": len(TRAIN),
                "chunk_size": 5,
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
    seen, rollouts = [], []
    train, read = PPOTrainer.train, Scorer.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PPOTrainer, "train", lambda self, *args: seen.append(self) or train(self, *args))
        patch.setattr(Scorer, "read", lambda self, *args: rollouts.append(read(self, *args)) or rollouts[-1])
        yield seen, rollouts


def questions(case: Case, folder: Path) -> list[Asked]:
    """Run all stages in ``folder`` and ask for everything that they computed."""
    base, out = folder / "base", folder / "run"
    write_files(folder)
    dropout = write_model(case.policy, base, case.sentencepiece)
    if case.family == ENCODER:
        write_model(ENCODER, folder / "judge")
    with watched() as (seen, rollouts):
        run(configuration(case, folder))
    metrics = {(row["stage"], row["step"]): row for row in _merged(records(out, "metrics.jsonl"))}
    asked = [*sft_losses(case, out, base, metrics, dropout), *reward_scores(case, out, metrics)]
    asked += rl_rollouts(case, out, metrics, rollouts)
    return [*asked, greedy_rollout(seen[-1], out)]


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One record a stage and step: losses of training and of evaluation are logged apart."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        merged.setdefault((row["stage"], row["step"]), {}).update(row)
    return list(merged.values())


def sft_losses(case: Case, out: Path, base: Path, metrics: dict, dropout: bool) -> list[Asked]:
    """The loss of each step by the weights before it, and the held-out loss before the first and after the last."""
    weights = [base, *(out / "checkpoints" / "ACTOR" / f"step-{step:06d}" for step in range(1, STEPS)), out / "actor"]

    def loss(folder: Path, rows: list, said: float) -> Asked:
        question = {"ask": "sft_loss", "folder": str(folder), "conversations": rows, "ids_of": str(out / "actor")}
        return Asked("SFT loss", question, said)

    asked = [loss(weights[step], case.held_out, metrics["ACTOR", step]["loss/eval"]) for step in range(STEPS + 1)]
    if not dropout:
        asked += [loss(weights[step], TRAIN, metrics["ACTOR", step + 1]["loss/train"]) for step in range(STEPS)]
    return asked


def reward_scores(case: Case, out: Path, metrics: dict) -> list[Asked]:
    """Scores of whole conversations, and what the last evaluation of the REWARD stage made of them."""
    held_out = judged(HELD_OUT, case.pairs)
    rows = [row[name] for row in held_out for name in ("messages", "chosen", "rejected") if name in row]
    settings = json.loads((out / "reward" / "reward_model.json").read_text())
    replies = [{"conversation": row, "finished": True} for row in rows]
    question = {"ask": "scores", "folder": str(out / "reward"), "replies": replies}
    last = metrics["REWARD", STEPS]

    def evaluated(scores: list[float]) -> dict[str, float]:
        if case.pairs:
            margins = [(a - b) / settings["scale"] for a, b in zip(scores[::2], scores[1::2], strict=True)]
            return {"loss/eval": statistics.fmean(math.log1p(math.exp(-margin)) for margin in margins)}
        squares = statistics.fmean((a - row["score"]) ** 2 for a, row in zip(scores, held_out, strict=True))
        return {"loss/eval": squares / settings["scale"] ** 2, "reward/rmse": math.sqrt(squares)}

    return [Asked("reward", question, {name: last[name] for name in evaluated([0.0] * len(rows))}, evaluated)]


def rl_rollouts(case: Case, out: Path, metrics: dict, rollouts: list) -> Iterator[Asked]:
    """The first rollout of held-out prompts, the first that was learned from, and the last of held-out prompts.

    Before the first update policy and critic are the fine-tuned actor and the reward model; after the last one they are
    folders of their own.
    """
    for number, purpose, policy, critic, step, prefix in (
        (0, "held-out", "actor", "reward", 0, "eval/"),
        (1, "rollout", "actor", "reward", 1, ""),
        (-1, "held-out", "actor_rl", "critic", 2, "eval/"),
    ):
        logged, (rollout, scores, read) = metrics["RL", step], rollouts[number]
        question = {
            "ask": "rollout",
            "policy": str(out / policy),
            "reference": str(out / "actor"),
            "critic": str(out / critic) if critic == "critic" or case.critic_judges else None,
            "prompts": [prompt_of(prompt.turns[-1].text) for prompt in rollout.prompts.prompts],
            "replies": real(rollout.response_ids, rollout),
            "seed": step_seed(SEED, 0, purpose),
            "sampling": SAMPLING,
        }
        said = [
            ("log-probabilities", "logprobs", real(read.logprobs, rollout)),
            ("log-probabilities", "logprobs", real(rollout.sampling_logprobs, rollout)),
            ("log-probabilities", "reference_logprobs", real(read.ref_logprobs, rollout)),
            ("entropy", "entropy", real(read.entropy, rollout)),
            ("KL", "kl", logged["eval/kl_k1" if prefix else "kl/ref_k1"]),
            ("sampled", "outside", real(torch.zeros_like(read.logprobs), rollout)),
            ("sampled", "finished", rollout.finished.tolist()),
            ("sampled", "complete", [True] * len(rollout)),
            ("values", "values", real(read.values, rollout)),
        ]
        yield from (Asked(quantity, question, value, itemgetter(name)) for quantity, name, value in said)
        question = {"ask": "scores", "folder": str(out / "reward"), "replies": judged_replies(out, question, rollout)}
        yield Asked("reward", question, scores.tolist())
        yield Asked("reward", question, logged["eval/reward" if prefix else "reward/mean"], statistics.fmean)
        if number == 1:
            shown = [row["score"] for row in records(out, "samples.jsonl") if row["step"] == step]
            yield Asked("reward", question, shown, itemgetter(slice(len(shown))))


def judged_replies(out: Path, question: dict[str, Any], rollout: Rollout) -> list[dict[str, Any]]:
    """Replies as the reward model reads them: the sampled ids where prompt and reply are one row, or texts."""
    prompts = question["prompts"]
    if json.loads((out / "reward" / "reward_model.json").read_text())["pooling"] == "last":
        pairs = zip(prompts, question["replies"], strict=True)
        return [{"prompt": prompt, "reply_ids": reply} for prompt, reply in pairs]
    return [
        {"conversation": [*prompt, {"role": "assistant", "content": text}], "finished": finished}
        for prompt, text, finished in zip(prompts, rollout.completions, rollout.finished.tolist(), strict=True)
    ]


def prompt_of(text: str) -> list[dict[str, str]]:
    """The prompt of the files whose last message this is."""
    return next(row[:-1] for row in (*TRAIN, *HELD_OUT) if row[-2]["content"] == text)


def real(values: torch.Tensor, rollout: Rollout) -> list[list[Any]]:
    """Of [B, R] what is real, row by row."""
    return [row[mask].tolist() for row, mask in zip(values, rollout.response_mask, strict=True)]


def greedy_rollout(trainer: PPOTrainer, out: Path) -> Asked:
    """What the finished policy says at a temperature near 0."""
    engine = trainer.engine
    cold = replace(engine, distribution=replace(engine.distribution, temperature=COLD))
    rollout = cold.generate(trainer.held_out.prompts, seed=0)
    prompts = [row[:-1] for row in HELD_OUT]
    question = {"ask": "greedy", "folder": str(out / "actor_rl"), "prompts": prompts, "sampling": SAMPLING}
    return Asked("greedy", question, real(rollout.response_ids, rollout))
