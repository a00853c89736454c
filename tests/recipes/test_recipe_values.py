"""Each value of a recipe is its document's: read from the documents themselves, where they are at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatrlhf import load_config
from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import Config

RECIPES = Path(__file__).resolve().parents[2] / "artifacts" / "config"
SEEDS = Path(__file__).resolve().parents[3] / "shared" / "seeds"
NAMES = ("shurale_7b", "orca_13b_8k", "airoboros_33b_16k", "stable_vicuna_13b", "config")


def document(number: str) -> str:
    found = sorted(SEEDS.glob(f"{number}_*.txt"))
    if not found:
        pytest.skip(f"no documents at {SEEDS}")
    return found[0].read_text(encoding="utf-8")


def recipe(name: str) -> Config:
    return load_config(RECIPES / f"{name}.yaml")


def cells(text: str) -> dict[str, str]:
    """The rows of a document's tables: first column to second."""
    rows = re.findall(r"^\|\s*([^|\n]+?)\s*\|\s*([^|\n]*?)\s*\|\s*$", text, re.MULTILINE)
    return dict(rows)


def meant(text: str) -> Any:
    return yaml.safe_load(text.replace(",", "")) if text not in ("None", "") else None


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_where_its_values_come_from(name):
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    assert max(map(len, text.splitlines())) <= 120
    if name == "config":  # ChatLLaMA's own file, whose keys test_load.py has one by one
        assert recipe(name).actor_config.model == "facebook/opt-1.3b"
        return
    assert "contradicts itself" in text
    assert (RECIPES / f"{name}.yaml").name in text.split("output_dir")[0]  # the command that runs it


def test_shurale():
    table = cells(document("000"))
    config = recipe("shurale_7b")
    actor, lora = config.actor_config, load_peft_config(config)
    assert {
        "seed": config.seed,
        "model_name_or_path": actor.model,
        "max_length": actor.max_sequence_length,
        "per_device_train_batch_size": actor.micro_batch_size,
        "Global batch size": actor.batch_size,
        "warmup_steps": actor.warmup_steps,
        "num_train_epochs": actor.epochs,
        "learning_rate": actor.lr,
        "max_grad_norm": actor.max_grad_norm,
        "weight_decay": actor.weight_decay,
        "label_smoothing_factor": actor.label_smoothing_factor,
        "logging_steps": actor.iteration_per_print,
        "save_steps": actor.checkpoint_steps,
        "save_total_limit": actor.n_checkpoints_to_keep,
        "use_gradient_checkpointing": actor.gradient_checkpointing,
        "load_in_4bit": actor.load_in_4bit,
        "bnb_4bit_use_double_quant": actor.bnb_4bit_use_double_quant,
        "bnb_4bit_quant_type": actor.bnb_4bit_quant_type,
        "use_flash_attention_2": actor.attn_implementation == "flash_attention_2",
        "apply_lora": actor.peft_enable,
        "lora_rank": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
    }.items() <= {name: float(value) if value == "2e-4" else meant(value) for name, value in table.items()}.items()
    assert table["lora_target_modules"] == "all" and lora.target_modules == "all-linear"
    (soda,) = actor.datasets
    assert soda.drop_narrative == 0.05 and "deliberately omitted from 5%" in document("000")
    text = (RECIPES / "shurale_7b.yaml").read_text(encoding="utf-8")
    samples, batch = meant(table["Num training samples"].split()[0]), meant(table["Global batch size"])
    assert f"{samples // batch:,} steps and a batch of {samples % batch}" in text
    assert table["Training steps"] == "18500" and '"Training steps" says 18500' in text
    assert f"{-(-1191582 // batch):,} steps" in text
    assert round(300036117 / (samples // batch)) == 17152 and "17,152" in text


def test_orca():
    text = document("004")
    written = yaml.safe_load(re.search(r"```\n(llama2_13b_orca_8k:.*?)```", text, re.DOTALL)[1])["llama2_13b_orca_8k"]
    config = recipe("orca_13b_8k")
    actor = config.actor_config
    assert {
        "rng_seed": config.seed,
        "sort_by_length": actor.sort_by_length,
        "output_dir": config.output_dir,
        "weight_decay": actor.weight_decay,
        "max_length": actor.max_sequence_length,
        "warmup_steps": actor.warmup_steps,
        "gradient_checkpointing": actor.gradient_checkpointing,
        "per_device_train_batch_size": actor.micro_batch_size,
        "eval_steps": actor.eval_interval,
        "save_steps": actor.checkpoint_steps,
        "num_train_epochs": actor.epochs,
        "save_total_limit": actor.n_checkpoints_to_keep,
        "peft_model": actor.peft_enable,
        "use_flash_attention": actor.attn_implementation == "flash_attention_2",
    }.items() <= {key: value for key, value in written.items() if not isinstance(value, (dict, list))}.items()
    assert actor.lr == float(written["learning_rate"])
    assert (actor.rope_scaling.type, actor.rope_scaling.factor) == ("linear", written["superhot_config"]["scale"])
    for entry, theirs in zip(actor.datasets, written["datasets"], strict=True):
        ((name, options),) = theirs.items()
        assert entry.name == name
        assert {key: getattr(entry, key) for key in options} == options
        assert entry.fraction == options.get("fraction", 1)
    counts = [int(count) for count in re.findall(r"00%\s\((\d+)\)", text)]
    assert counts == [188842, 47760, 188262]
    assert sum(counts) // actor.batch_size == 3319 and "checkpoint: 3319 steps" in text
    assert actor.batch_size == 8 * actor.micro_batch_size * written["gradient_accumulation_steps"]


def test_airoboros():
    text = document("001")
    config = recipe("airoboros_33b_16k")
    actor = config.actor_config
    assert "a scaling factor of 8, giving a theoretical max context of 16384" in text
    assert (actor.rope_scaling.type, actor.rope_scaling.factor) == ("linear", 8)
    assert actor.max_sequence_length == 16384 == actor.rope_scaling.factor * 2048
    assert "QLoRA fine-tune" in text and actor.load_in_4bit and actor.peft_enable
    assert "jondurbin/airoboros-gpt4-1.4.1" in text and [entry.name for entry in actor.datasets] == ["airoboros"]
    long = config.pretrain_config
    assert f"additional {long.steps} steps on {long.max_sequence_length} length sequences from the pile" in text
    assert [entry.name for entry in long.datasets] == ["pile"]
    assert "bits = 4, group_size = 128, desc_act = True" in text


def test_stable_vicuna():
    table = cells(document("002"))
    config = recipe("stable_vicuna_13b")
    rl = config.trainer_config
    keys = (
        "num_rollouts",
        "chunk_size",
        "ppo_epochs",
        "init_kl_coef",
        "target",
        "horizon",
        "gamma",
        "lam",
        "cliprange",
    )
    keys += ("cliprange_value", "vf_coef", "scale_reward", "cliprange_reward")
    for key in keys:
        assert getattr(rl, key) == meant(table[key]), key
    for key in ("max_length", "min_length", "top_k", "top_p", "do_sample", "temperature"):
        assert getattr(rl.gen_kwargs, key) == meant(table[key]), key
    asked = [[entry.name for entry in section.datasets] for section in (config.actor_config, config.reward_config)]
    assert asked == [["OASST1", "GPT4ALL", "ALPACA"], ["OASST1", "ARLHF", "SHP"]]
    for name in ("OpenAssistant/oasst1", "nomic-ai/gpt4all_prompt_generations", "Anthropic/hh-rlhf", "stanfordnlp/SHP"):
        assert name in document("002")


def test_getting_started():
    text = document("003")
    assert "we used OPT-1.3B" in text
    for path, stage in re.findall(r"python artifacts/main.py (\S+) --type (\w+)", text):
        assert (RECIPES.parents[1] / path) == RECIPES / "config.yaml"
        assert stage in ("ALL", "ACTOR", "REWARD", "RL")
    config = recipe("config")
    assert config.actor_config.train_dataset_path.endswith("datasets/actor_training_data.json")
    assert config.reward_config.train_dataset_path.endswith("datasets/reward_training_data.json")
    assert config.trainer_config.examples_path.endswith("datasets/rlhf_training_data.json")
