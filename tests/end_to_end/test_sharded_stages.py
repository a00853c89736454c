"""All three stages by two processes, plain and sharded by DeepSpeed and FSDP2: the optimizer steps of one process."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_run import finish, records, signal_at, start, write_config, write_files
from tiny import flan_t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.models.reward_model import load_reward_model
from chatrlhf.sharding.checkpoint_layout import SHARDING

pytestmark = pytest.mark.slow

ZERO = {
    "ZeRO-2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": "auto"},
}
SECTIONS = ("actor_config", "reward_config")
# The engines, and where rank 1 is asked to stop, so that the run has to be resumed.
IN_RL = ("rl.optimizer_step", 4)
IN_ACTOR = ("trainer.log", 5)
ENGINES = {
    "DeepSpeed ZeRO-2": ("DeepSpeedEngine", IN_RL),
    "DeepSpeed ZeRO-3": ("DeepSpeedEngine", IN_ACTOR),
    "FSDP2": ("FSDP", IN_RL),
}
# As `accelerate launch` sets the environment, on CPUs.
ON_CPUS = """
import os, sharded_ranks
os.environ |= sharded_ranks.FSDP2 | {"ACCELERATE_MIXED_PRECISION": "no"}
sharded_ranks.have_fsdp_on_cpus()
import chatrlhf.sharding.launch
chatrlhf.sharding.launch.supports_fsdp = lambda: True
"""
STAGES = {"ACTOR": ("loss/train",), "REWARD": ("loss/train",), "RL": ("loss/policy", "loss/value")}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A step of RL is one optimizer step, in microbatches."""
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    for name, settings in ZERO.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": settings}), encoding="utf-8")
    batches = dict(trainer_config__batch_size=8, trainer_config__ppo_epochs=1, trainer_config__micro_batch_size=2)
    return write_config(folder, actor_config__micro_batch_size=2, **batches)


def run(config: Path, run_dir: Path, ranks: int, *words: str, code: str | None = None) -> tuple[int, str, str]:
    return finish(start(str(config), "--output-dir", str(run_dir), *words, ranks=ranks, code=code))


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    status, out, err = run(config, run_dir, 1)
    assert status == 0, err
    return run_dir


def losses(run_dir: Path, stage: str, name: str) -> list[float]:
    return [row[name] for row in records(run_dir, "metrics.jsonl") if row["stage"] == stage and name in row]


def assert_the_same(run_dir: Path, alone: Path) -> None:
    """Losses of the optimizer steps, and models that load in one process and are those of one."""
    for stage, names in STAGES.items():
        for name in names:
            got, want = (losses(each, stage, name) for each in (run_dir, alone))
            assert len(got) == len(want) >= 5
            assert got[:5] == pytest.approx(want[:5], rel=1e-4, abs=1e-6), (stage, name)
    for folder in ("actor", "reward", "actor_rl", "critic"):
        first, second = (load_file(each / folder / "model.safetensors") for each in (run_dir, alone))
        assert first.keys() == second.keys()
        for name, weight in second.items():
            assert first[name].dtype == weight.dtype
            assert (first[name] - weight).abs().max() <= 1e-3 * weight.abs().max(), (folder, name)
    AutoModelForCausalLM.from_pretrained(run_dir / "actor_rl")
    assert load_reward_model(run_dir / "reward").score(["hello"], ["well"])


def test_plain_data_parallelism(config, alone, tmp_path):
    status, out, err = run(config, tmp_path / "run", 2)
    assert status == 0, err
    assert_the_same(tmp_path / "run", alone)


def switches(name: str) -> list[str]:
    """The words that turn an engine on."""
    values = ["accelerate_enable=True"]
    if name.startswith("DeepSpeed"):
        values = ["deepspeed_enable=True", f"deepspeed_config_path={name.split()[1]}.json"]
    return [word for section in SECTIONS for value in values for word in ("--set", f"{section}.{value}")]


@pytest.mark.parametrize("name", ENGINES)
def test_dealt_out_also_when_it_is_stopped_and_resumed(config, alone, tmp_path, name):
    (kind, (place, call)), words = ENGINES[name], switches(name)
    before = ON_CPUS if name == "FSDP2" else ""
    stop = signal_at(place, signal.SIGTERM, call, rank=1)
    status, out, err = run(config, tmp_path / "run", 2, *words, code=before + stop)
    assert status != 0 and err.count("continue with --resume") == 1, err
    said = out
    status, out, err = run(config, tmp_path / "run", 2, *words, "--resume", code=before or None)
    assert status == 0, err
    assert "resumed from" in out
    said += out
    for stage in STAGES:
        assert f"{stage}: trained by {name} in 2 processes ({kind}" in said
    assert_the_same(tmp_path / "run", alone)
    newest = sorted((tmp_path / "run" / "checkpoints" / "RL").glob("step-*"))[-1]
    assert json.loads((newest / SHARDING).read_text()) == {"by": name, "processes": 2}


@pytest.mark.nightly
def test_an_encoder_decoder_is_dealt_out(config, tmp_path):
    """Without dropout, for which each process draws numbers of its own."""
    tokenizer = train_tokenizer(["the cat sat on the mat"], 270)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = dict(vocab_size=270, d_model=32, d_kv=16, d_ff=64, dropout_rate=0.0)
    flan_t5(**sizes, **ids, decoder_start_token_id=ids["pad_token_id"]).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = ("--set", f"actor_config.model={tmp_path / 'base'}", "--set", "actor_config.template=raw")
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir, ranks, more in ((one, 1, []), (two, 2, switches("DeepSpeed ZeRO-3"))):
        status, out, err = run(config, run_dir, ranks, *words, *more)
        assert status == 0, err
    for stage in STAGES:
        assert f"{stage}: trained by DeepSpeed ZeRO-3 in 2 processes (DeepSpeedEngine" in out
    for stage in ("ACTOR", "REWARD"):
        got, want = (losses(each, stage, "loss/train") for each in (two, one))
        assert len(got) == len(want) >= 5 and got[:5] == pytest.approx(want[:5], rel=1e-4)
    # RL rests on a reward model that has gone its way for some more steps: its first step is that of one process.
    for name in STAGES["RL"]:
        got, want = (losses(each, "RL", name)[0] for each in (two, one))
        assert got == pytest.approx(want, rel=1e-2, abs=1e-4), name
    AutoModelForSeq2SeqLM.from_pretrained(two / "actor_rl")
    assert load_reward_model(two / "critic").model.pooling == "reply"
