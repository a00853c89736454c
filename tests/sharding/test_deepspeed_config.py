"""DeepSpeed's JSON beside the YAML: which file it is, what "auto" becomes, and contradictions by name."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from chatrlhf.config import load_config
from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.sharding import launch
from chatrlhf.sharding.accelerate_env import DeepSpeed, Fsdp2, environment_for
from chatrlhf.sharding.checkpoint_layout import check_sharding, write_sharding
from chatrlhf.sharding.deepspeed_config import filled, read_deepspeed_config
from chatrlhf.sharding.launch import check_launch, optimization_of, sharding_of

ROOT = Path(__file__).parent.parent.parent
STAGES = ["ACTOR", "REWARD", "RL"]


def free_port() -> str:
    with socket.socket() as listening:
        listening.bind(("", 0))
        return str(listening.getsockname()[1])


def made(folder: Path, settings: dict, **actor) -> object:
    (folder / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}} | settings), encoding="utf-8")
    keys = {"deepspeed_enable": True, "deepspeed_config_path": str(folder / "ds.json")}
    return load_config({"actor_config": keys | {"batch_size": 8, "micro_batch_size": 2} | actor})


# ----- which file


def test_the_named_file_is_taken_from_beside_the_yaml(tmp_path):
    (tmp_path / "mine.json").write_text('{"zero_optimization": {"stage": 1}}', encoding="utf-8")
    (tmp_path / "config.yaml").write_text(
        "actor_config: {deepspeed_enable: True, deepspeed_config_path: mine.json}", encoding="utf-8"
    )
    found = sharding_of(load_config(tmp_path / "config.yaml"), "ACTOR")
    assert (found.source, found.stage) == (str(tmp_path / "mine.json"), 1)


def test_without_a_name_it_is_the_one_beside_the_yaml_else_the_roots(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("actor_config: {deepspeed_enable: True}", encoding="utf-8")
    config = load_config(tmp_path / "config.yaml")
    monkeypatch.chdir(tmp_path)  # not the checkout
    settings, path = read_deepspeed_config(config, "actor_config")
    assert path.resolve() == ROOT / "ds_config.json"
    assert settings == json.loads((ROOT / "ds_config.json").read_text())
    (tmp_path / "ds_config.json").write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    assert sharding_of(config, "RL").stage == 3


@pytest.mark.parametrize("text, message", [("{,", "cannot be read as JSON"), ("{}", 'no "zero_optimization"')])
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    config = made(tmp_path, {})
    (tmp_path / "ds.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        sharding_of(config, "ACTOR")


CONFIG = ROOT / "artifacts" / "config"
OURS = [ROOT / "ds_config.json", CONFIG / "ds_config.json", *sorted((CONFIG / "deepspeed").glob("*.json"))]


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_our_files_contradict_no_configuration(path):
    keys = {"deepspeed_enable": True, "deepspeed_config_path": str(path)}
    config = load_config({"actor_config": keys | {"batch_size": 12}, "reward_config": keys | {"lr": 1e-4}})
    check_launch(config, STAGES)


def test_accelerates_files_are_read_by_accelerate_and_ask_for_what_we_have(monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    found = {}
    for path in sorted((CONFIG / "accelerate").glob("*.yaml")):
        cluster = load_config_from_file(str(path))
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        # It looks whether the port is free, and the usual one may not be.
        words = ["--config_file", str(path), "--main_process_port", free_port(), "main.py", "config.yaml"]
        args = launch_command_parser().parse_args(words)
        args, _, _ = _validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(
                cluster.deepspeed_config
            )  # as `launch_command` does
            environment = prepare_deepspeed_cmd_env(args)[1]
        else:
            environment = prepare_multi_gpu_env(args)
        monkeypatch.undo()
        for name, value in environment.items():
            if name.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(name, value)
        config = load_config({"actor_config": {"accelerate_enable": True}})
        found[path.stem] = (str(sharding_of(config, "ACTOR")), cluster.num_processes, cluster.num_machines)
        monkeypatch.undo()
    assert found == {
        "1x24GB": ("DeepSpeed ZeRO-2", 1, 1),
        "4xA100": ("FSDP2", 4, 1),
        "8xA100": ("DeepSpeed ZeRO-3", 8, 1),
        "two_nodes": ("DeepSpeed ZeRO-3", 16, 2),
    }


# ----- what it says


def test_auto_becomes_what_the_yaml_says(tmp_path):
    written = {
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": 0.5}},
        "train_batch_size": "auto",
    }
    keys = dict(lr=1e-4, weight_decay=0.5, max_grad_norm=None, precision="bf16", betas=[0.8, 0.9])
    config = made(tmp_path, written, **keys)
    settings = filled(sharding_of(config, "ACTOR").settings, optimization_of(config, "ACTOR"))
    assert settings["optimizer"]["params"] == {"lr": 1e-4, "betas": [0.8, 0.9], "weight_decay": 0.5}
    # Also what the JSON leaves out: DeepSpeed's defaults would be others.
    assert (settings["train_batch_size"], settings["train_micro_batch_size_per_gpu"]) == (8, 2)
    assert (settings["gradient_accumulation_steps"], settings["gradient_clipping"]) == (4, 0.0)
    assert (settings["bf16"], settings["fp16"]) == ({"enabled": True}, {"enabled": False})


ADAM = {"type": "AdamW", "params": {"lr": 2e-5}}
CONTRADICTIONS = [
    ({"train_batch_size": 64}, r"train_batch_size is 64 and the YAML's actor_config.batch_size makes it 8"),
    ({"train_micro_batch_size_per_gpu": 4}, r"per_gpu is 4 and the YAML's actor_config.micro_batch_size makes it 2"),
    ({"gradient_accumulation_steps": 1}, r"steps is 1 and the YAML's actor_config.batch_size and .* makes it 4"),
    ({"gradient_clipping": 0.5}, r"gradient_clipping is 0.5 and the YAML's actor_config.max_grad_norm makes it 1.0"),
    ({"optimizer": ADAM}, r"optimizer.params.lr is 2e-05 and the YAML's actor_config.lr makes it 9e-06"),
    ({"optimizer": {"params": {"betas": [0.9, 0.95]}}}, r"betas is \[0.9, 0.95\] .*betas makes it \[0.9, 0.999\]"),
    ({"optimizer": {"params": {"weight_decay": 0.1}}}, r"weight_decay is 0.1 .*weight_decay makes it 0.0"),
    ({"optimizer": {"params": {"eps": 1e-5}}}, r"eps is 1e-05 and the stages have 1e-08"),
    ({"bf16": {"enabled": True}}, r"bf16.enabled is true and the YAML's actor_config.precision makes it false"),
    ({"scheduler": {"type": "WarmupLR"}}, r"type is \"WarmupLR\" and actor_config.lr_scheduler is 'linear'"),
    (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 7, "total_num_steps": 9}}},
        r"warmup_num_steps is 7 .*warmup_steps makes it 0.*total_num_steps is 9",
    ),
]


@pytest.mark.parametrize("settings, message", CONTRADICTIONS)
def test_contradictions_are_named_with_both_values_and_keys(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        sharding_of(made(tmp_path, settings, precision="fp32"), "ACTOR")
    assert str(tmp_path / "ds.json") in str(raised.value) and "set" in str(raised.value)


def test_what_agrees_is_taken(tmp_path):
    schedule = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 9.0e-6, "total_num_steps": "auto"}}
    agreeing = {"train_batch_size": 8, "gradient_clipping": 1, "bf16": {"enabled": False}, "scheduler": schedule}
    assert sharding_of(made(tmp_path, agreeing, precision="fp32"), "ACTOR").stage == 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"scheduler": {"type": "WarmupDecayLR"}}, "trainer_config.lr_scheduler sets RL's schedule"),
        ({"gradient_accumulation_steps": 4}, "depends on the lengths of the responses"),
        ({"train_batch_size": 8}, r"train_batch_size is 8 and the YAML's trainer_config.batch_size makes it 16"),
    ],
)
def test_rl_has_steps_of_its_own(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        sharding_of(made(tmp_path, settings), "RL")


# ----- the switches


def test_both_launchers_at_once_and_a_critic_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="deepspeed_enable: True and accelerate_enable: True"):
        load_config({"actor_config": {"deepspeed_enable": True, "accelerate_enable": True}})
    config = load_config({"actor_config": {"deepspeed_enable": True}, "critic_config": {"deepspeed_enable": False}})
    with pytest.raises(ConfigError, match="critic_config.deepspeed_enable: False and actor_config.deepspeed_enable"):
        sharding_of(config, "RL")
    assert sharding_of(config, "ACTOR").stage == 2  # a critic is RL's affair


def test_accelerate_has_to_have_started_the_run(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    config = load_config({"reward_config": {"accelerate_enable": True}})
    with pytest.raises(ConfigError, match=r"accelerate launch --config_file artifacts\S+ main.py"):
        sharding_of(config, "REWARD")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert sharding_of(config, "REWARD") is None  # plain data parallelism
    assert sharding_of(config, "ACTOR") is None


def test_accelerates_deepspeed_is_taken_with_the_yamls_numbers(monkeypatch):
    launched = {"MIXED_PRECISION": "no", "USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": "3"}
    # Its launcher says 1 where no one has said anything.
    for name, value in (launched | {"GRADIENT_ACCUMULATION_STEPS": "1"}).items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    config = load_config({"actor_config": {"accelerate_enable": True, "batch_size": 8, "micro_batch_size": 2}})
    found = sharding_of(config, "ACTOR")
    assert (found.stage, filled(found.settings, optimization_of(config, "ACTOR"))["train_batch_size"]) == (3, 8)
    monkeypatch.setenv("ACCELERATE_GRADIENT_CLIPPING", "0.3")
    with pytest.raises(ConfigError, match="gradient_clipping is 0.3"):
        sharding_of(config, "ACTOR")


def test_a_launchers_wish_that_no_section_has_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="configured for FSDP, and actor_config have accelerate_enable: False"):
        check_launch(load_config({}), ["ACTOR", "RL"])


@pytest.mark.parametrize(
    "variable, value, message",
    [
        ("FSDP_VERSION", "1", "fsdp_version is 1; set it to 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: true"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "precision makes it fp32, and accelerate's .*: bf16"),
    ],
)
def test_what_fsdp2_cannot_be_had_with(monkeypatch, variable, value, message):
    for name, usual in (("ACCELERATE_MIXED_PRECISION", "no"), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, usual)
    keys = {"accelerate_enable": True, "precision": "fp32"}
    config = load_config({"actor_config": keys})
    assert sharding_of(config, "ACTOR") == Fsdp2()
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=message):
        sharding_of(config, "ACTOR")


def test_fsdp2_on_cpus_is_refused_by_name(monkeypatch):
    for name, usual in (("ACCELERATE_MIXED_PRECISION", "no"), ("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, usual)
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="FSDP on GPUs only"):
        sharding_of(load_config({"actor_config": {"accelerate_enable": True, "precision": "fp32"}}), "ACTOR")


def test_fp16_is_for_gpus():
    with pytest.raises(ConfigError, match="actor_config.precision: fp16 is for GPUs"):
        check_launch(load_config({"actor_config": {"precision": "fp16"}}), ["ACTOR"])


def test_a_stage_finds_only_what_it_asked_for(monkeypatch):
    import os

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    before = dict(os.environ)
    with environment_for(None):
        assert not {"ACCELERATE_USE_FSDP", "ACCELERATE_DEEPSPEED_ZERO_STAGE"} & os.environ.keys()
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as accelerate does
    assert dict(os.environ) == before


# ----- checkpoints


def test_states_are_read_only_as_they_were_dealt_out(tmp_path):
    zero = DeepSpeed({"zero_optimization": {"stage": 3}}, "ds.json")
    write_sharding(tmp_path, zero)
    check_sharding(tmp_path, zero)
    with pytest.raises(CheckpointError, match="written DeepSpeed ZeRO-3 in 1 processes, and this run has them whole"):
        check_sharding(tmp_path, None)
    (tmp_path / "plain").mkdir()
    write_sharding(tmp_path / "plain", None)
    check_sharding(tmp_path / "plain", None)
    with pytest.raises(CheckpointError, match="written whole, and this run has them FSDP2"):
        check_sharding(tmp_path / "plain", Fsdp2())


def test_weights_in_few_bits_are_not_dealt_out(tmp_path):
    keys = dict(peft_enable=True, load_in_4bit=True, precision="fp32")
    check_launch(made(tmp_path, {}, **keys), ["ACTOR"])
    with pytest.raises(ConfigError, match="load_in_4bit, load_in_8bit: DeepSpeed ZeRO-3 would shard"):
        check_launch(made(tmp_path, {"zero_optimization": {"stage": 3}}, **keys), ["ACTOR"])
