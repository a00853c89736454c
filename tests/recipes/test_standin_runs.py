"""Each recipe from its first command to its last, on models that stand in for the real ones and rows in their shapes.

What a recipe says stays as it is, but for places, lengths, sizes of batches and how long it trains.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from published import entries, write_datasets, write_standin
from safetensors.torch import load_file
from tiny import opt
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatrlhf import load_config
from chatrlhf.cli import main
from chatrlhf.data.templates import FORMATS
from chatrlhf.models.loading.lora import base_of

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).resolve().parents[2] / "artifacts" / "config"
SHORT = {"actor_config.precision": "fp32", "actor_config.batch_size": 8, "actor_config.micro_batch_size": 8}
SHORT["actor_config.attn_implementation"] = "sdpa"  # flash attention needs a GPU
SHORT["actor_config.deepspeed_enable"] = False  # test_sharded_stages.py has it


@pytest.fixture
def recipe(tmp_path, one_thread):
    """Runs a recipe by the command line, in its own words but for what is given; returns its folder."""

    def train(name: str, stage: str, actor: Path, changes: dict[str, Any], *words: str) -> Path:
        path = RECIPES / f"{name}.yaml"
        written = load_config(path)
        changes = {"actor_config.datasets": entries(written.actor_config.datasets, tmp_path / "rows"), **changes}
        if written.pretrain_config.names_data:
            changes["pretrain_config.datasets"] = entries(written.pretrain_config.datasets, tmp_path / "rows")
        if stage in ("ALL", "REWARD"):
            changes["reward_config.datasets"] = entries(written.reward_config.datasets, tmp_path / "rows")
            changes["trainer_config.datasets"] = entries(written.trainer_config.datasets, tmp_path / "rows")
        given = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        words = (str(path), "--type", stage, "-a", str(actor), "--output-dir", str(tmp_path / "run"), *words)
        assert main([*words, *given]) == 0
        return tmp_path / "run"

    return train


def test_getting_started_trains_opt_on_what_the_download_writes(tmp_path, one_thread, capsys, monkeypatch):
    transcripts = write_datasets(tmp_path / "rows", "ARLHF")["ARLHF"]
    download = [sys.executable, str(RECIPES.parent / "download_dataset.py"), "ARLHF", "--path", "datasets"]
    words = [*download, "--number_of_samples", "20", "--source", str(transcripts)]
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    tokenizer = AutoTokenizer.from_pretrained(write_standin(tmp_path / "tokenizer"))
    for name, width in (("actor", 32), ("reward", 16)):
        sizes = dict(hidden_size=width, ffn_dim=2 * width, word_embed_proj_dim=width, max_position_embeddings=256)
        opt(vocab_size=len(tokenizer), **sizes).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    changes = {"actor_config.train_dataset_path": "datasets/actor_training_data.json"}
    changes |= {"reward_config.train_dataset_path": "datasets/reward_training_data.json"}
    changes |= {"trainer_config.examples_path": "datasets/rlhf_training_data.json", "critic_config.model": "reward"}
    changes |= {"actor_config.min_tokens": 2, "actor_config.max_tokens": 8}
    changes |= {"guards_config.allow_untrained_actor": True}  # of twenty rows it learns little
    changes |= {"trainer_config.num_episodes": 2, "trainer_config.max_timesteps": 8, "actor_config.precision": "fp32"}
    changes |= {"trainer_config.update_timesteps": 8, "trainer_config.precision": "fp32"}
    given = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    words = [str(RECIPES / "config.yaml"), "--type", "ALL", "-a", "actor", "-r", "reward", "--output-dir", "run"]
    monkeypatch.chdir(tmp_path)
    assert main([*words, *given]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in lines if "kl/ref" in line]) == 2
    assert "starts from the reward model" in capsys.readouterr().out  # one model for both, as published
    folders = ("actor", "run/actor", "run/actor_rl")
    before, tuned, after = (load_file(tmp_path / name / "model.safetensors") for name in folders)
    frozen = "model.decoder.embed_tokens.weight"
    assert torch.equal(before[frozen], tuned[frozen])  # froze_embeddings
    for first, second in ((before, tuned), (tuned, after)):
        assert any(not torch.equal(first[name], second[name]) for name in second)


def logits(folder: Path, text: str = "What is 3 of rain in OASST1?") -> torch.Tensor:
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text).input_ids)[None]
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def steps(run: Path, stage: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "loss/train" in line]


def test_shurale_learns_narratives_with_smoothed_labels(recipe, tmp_path, monkeypatch):
    import trl

    seen = []
    start = trl.SFTTrainer.__init__
    monkeypatch.setattr(trl.SFTTrainer, "__init__", lambda self, **given: seen.append(given) or start(self, **given))
    base = write_standin(tmp_path / "base", positions=256)
    changes = SHORT | {"actor_config.max_sequence_length": 256, "actor_config.epochs": 6}
    run = recipe("shurale_7b", "ACTOR", base, changes | {"actor_config.warmup_steps": 4, "actor_config.lr": 5e-3})
    (given,) = seen
    assert given["args"].label_smoothing_factor == 0.1 and given["args"].weight_decay == 0.001
    layers = [module for name, module in given["model"].named_modules() if name.endswith("up_proj.base_layer")]
    assert {type(layer).__name__ for layer in layers} == {"Linear4bit"} and len(layers) == 2
    read = AutoTokenizer.from_pretrained(run / "actor").decode(given["train_dataset"][0]["input_ids"])
    narrative, *turns = read.split("\n")
    assert narrative.startswith("Garry asks Bob of ") and [turn.split(":")[0] for turn in turns[:2]] == ["Garry", "Bob"]
    labels = given["train_dataset"][0]["labels"]
    assert -100 not in labels  # every token is trained, the narrative too
    adapters = json.loads((run / "actor" / "adapter_config.json").read_text())
    assert (adapters["r"], adapters["lora_alpha"]) == (64, 32) and len(adapters["target_modules"]) == 14
    lines = steps(run, "ACTOR")
    assert len(lines) == 18 and lines[-1]["loss/train"] < lines[0]["loss/train"] - 0.3
    assert lines[3]["lr"] == pytest.approx(5e-3, rel=0.3) and lines[-1]["lr"] < 5e-4  # up, then down to nothing
    assert len(list((run / "checkpoints" / "ACTOR").glob("step-*"))) == 1
    assert main(["export", "merge", "--model", str(run / "actor"), "--output", str(tmp_path / "merged")]) == 0
    assert FORMATS["shurale"].source == (tmp_path / "merged" / "chat_template.jinja").read_text()
    assert (logits(tmp_path / "merged") - logits(base)).abs().max() > 0.1


def test_orca_mixes_its_sources_at_twice_the_positions(recipe, tmp_path, capsys):
    base = write_standin(tmp_path / "base", positions=64)
    mixed = entries(load_config(RECIPES / "orca_13b_8k.yaml").actor_config.datasets, tmp_path / "rows")
    dolphin = {"name": "dolphin", "source": str(write_datasets(tmp_path / "rows", "dolphin")["dolphin"])}  # its header
    changes = {"actor_config.datasets": [*mixed, dolphin], "actor_config.max_sequence_length": 128}
    changes |= {"actor_config.warmup_steps": 2, "actor_config.lr": 2e-3, "actor_config.eval_interval": 4}
    run = recipe("orca_13b_8k", "ACTOR", base, SHORT | changes)
    said = capsys.readouterr()
    said = said.out + said.err
    for name in ("orca-chat", "fanfics", "red_pajama", "dolphin"):
        assert name in said
    assert len(json.loads((run / "manifest.json").read_text())["stages"]["ACTOR"]["inputs"]) == 4
    config = json.loads((run / "actor" / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 2 and config["rope_parameters"]["rope_type"] == "linear"
    assert config["max_position_embeddings"] == 64
    lines = steps(run, "ACTOR")
    assert lines[-1]["loss/train"] < lines[0]["loss/train"]
    assert not (run / "actor" / "adapter_config.json").exists()
    assert FORMATS["orca"].source == (run / "actor" / "chat_template.jinja").read_text()


def test_stable_vicuna_is_put_together_again_of_its_delta(recipe, tmp_path):
    llama, vicuna = write_standin(tmp_path / "llama", positions=256), tmp_path / "vicuna"
    write_standin(vicuna, seed=1, positions=256)
    small = {"max_sequence_length": 256, "batch_size": 8, "micro_batch_size": 8, "precision": "fp32"}
    changes = {f"{section}.{key}": small[key] for section in ("actor_config", "reward_config") for key in small}
    changes |= {"actor_config.lr": 2e-3, "actor_config.warmup_steps": 2, "actor_config.gradient_checkpointing": False}
    short = {"num_rollouts": 16, "total_episodes": 32, "chunk_size": 8, "batch_size": 8, "actor_lr": 1e-3}
    short |= {"generation_kwargs.max_length": 96, "eval_interval": None, "precision": "fp32"}
    changes |= {f"trainer_config.{key}": value for key, value in short.items()}
    changes |= {f"{section}_config.deepspeed_enable": False for section in ("actor", "reward", "critic")}
    run = recipe("stable_vicuna_13b", "ALL", vicuna, changes)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rl = [line for line in lines if "kl/ref" in line]
    assert abs(rl[0]["kl/ref"]) < 1e-3 < abs(rl[-1]["kl/ref"])
    assert rl[0]["kl/coef"] == pytest.approx(0.1) and rl[-1]["kl/coef"] < 0.1  # a target of 6 nats is far above
    delta, again = tmp_path / "delta", tmp_path / "again"
    made = ["export", "delta", "--base", str(llama), "--target", str(run / "actor_rl"), "--output", str(delta)]
    assert main(made) == 0
    put = ["export", "apply-delta", "--base", str(llama), "--delta", str(delta), "--output", str(again)]
    assert main(put) == 0
    torch.testing.assert_close(logits(again), logits(run / "actor_rl"), rtol=0, atol=0)
    assert (logits(again) - logits(vicuna)).abs().max() > 0.1
    difference = load_file(delta / "model.safetensors")["model.embed_tokens.weight"]
    assert not torch.equal(difference, load_file(run / "actor_rl" / "model.safetensors")["model.embed_tokens.weight"])
    wrong = ["--base", str(vicuna), "--delta", str(delta), "--output", str(tmp_path / "wrong")]
    assert main(["export", "apply-delta", *wrong]) == 2
    assert FORMATS["stable_vicuna"].source == (again / "chat_template.jinja").read_text()


def test_airoboros_is_stretched_pretrained_tuned_merged_and_quantized(recipe, tmp_path, capsys):
    base = write_standin(tmp_path / "base", positions=32)
    changes = SHORT | {"actor_config.max_sequence_length": 256, "actor_config.lr": 5e-3}
    long = {"max_sequence_length": 128, "steps": 6, "batch_size": 4, "micro_batch_size": 4, "lr": 5e-3}
    changes |= {f"pretrain_config.{key}": value for key, value in (long | {"precision": "fp32"}).items()}
    run = recipe("airoboros_33b_16k", "PRETRAIN", base, changes)
    lines = steps(run, "PRETRAIN")
    assert len(lines) == 6 and lines[-1]["loss/train"] < lines[0]["loss/train"]
    pretrained = load_file(run / "pretrained" / "adapter_model.safetensors")
    assert recipe("airoboros_33b_16k", "ACTOR", base, changes) == run
    assert "continues with the adapters of PRETRAIN" in capsys.readouterr().out
    lines = steps(run, "ACTOR")
    assert lines[-1]["loss/train"] < lines[0]["loss/train"] - 0.3
    assert base_of(str(run / "actor")) == str(base.resolve())
    tuned = load_file(run / "actor" / "adapter_model.safetensors")
    assert tuned.keys() == pretrained.keys() and not any(torch.equal(tuned[name], pretrained[name]) for name in tuned)
    merged, small = tmp_path / "merged", tmp_path / "gptq"
    assert main(["export", "merge", "--model", str(run / "actor"), "--output", str(merged)]) == 0
    rows = write_datasets(tmp_path / "rows", "airoboros")["airoboros"]
    calibration = tmp_path / "rows.json"  # in this project's shape, as a user would download them
    shown = [json.loads(line) for line in rows.read_text().splitlines()]
    asked = [{"user_input": row["instruction"], "completion": row["response"]} for row in shown]
    calibration.write_text(json.dumps(asked))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(json.loads(line)["text"] for line in write_text(tmp_path).read_text().splitlines()))
    words = ["--calibration", str(calibration), "--text", str(text), "--length", "128", "--context", "256"]
    assert main(["export", "quantize", "--model", str(merged), "--output", str(small), *words]) == 0
    assert "after (gptq)" in capsys.readouterr().out
    for folder in (merged, small):
        config = json.loads((folder / "config.json").read_text())
        assert config["rope_parameters"]["factor"] == 8 and config["max_position_embeddings"] == 32
    (scheme,) = json.loads((small / "config.json").read_text())["quantization_config"]["config_groups"].values()
    assert (scheme["weights"]["num_bits"], scheme["weights"]["group_size"]) == (4, 128)
    whole, few, plain = logits(merged), logits(small), logits(base)
    assert 0 < (few - whole).square().mean().sqrt() < 0.3 * whole.std()
    assert (whole - plain).square().mean().sqrt() > 0.5 * whole.std()
    assert FORMATS["airoboros"].source == (small / "chat_template.jinja").read_text()
    models = [str(folder) for folder in (base, merged, small)]
    ladder = ["eval", "perplexity", str(text), "--models", *models, "--contexts", "64,128,256", "--windows", "4"]
    assert main(ladder) == 0


def write_text(tmp_path: Path) -> Path:
    """Long plain text."""
    return write_datasets(tmp_path / "rows", "pile")["pile"]
