"""PRETRAIN before the other stages: what it leaves, who starts from it, adapters that are trained on, resume."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import differences, finish, left_behind, length, settings, signal_at, start, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatrlhf import load_config, run
from chatrlhf.cli import main
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.models.loading.lora import BASE_CONFIG, base_of
from chatrlhf.rl.ppo import PPOTrainer

IDS = torch.arange(2, 30)[None]
LINE = "the visitor asks where the clerk is and the clerk says well hello there {}\n"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    (folder / "play.txt").write_text("".join(LINE.format(i) for i in range(120)))
    return folder


def made(files: Path, **changes) -> dict:
    """Settings of all stages, PRETRAIN at twice the positions that the model was made for; with changes."""
    tree = settings(files)
    tree["actor_config"] |= {"rope_scaling": {"type": "linear", "factor": 2}}
    tree["actor_config"]["tiny"]["max_position_embeddings"] = 64
    tree["trainer_config"] |= {"total_episodes": 8, "eval_interval": None}
    tree["pretrain_config"] = {
        "train_dataset_path": str(files / "play.txt"),
        "max_sequence_length": 128,
        "steps": 6,
        "batch_size": 4,
        "micro_batch_size": 2,
        "lr": 3e-3,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "checkpoint_steps": 2,
        "weight_decay": 0.1,
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            tree[section][name] = value
        else:
            tree[section] = value
    return tree


def lines(run_dir: Path, stage: str) -> list[dict]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["stage"] == stage]


def logits(folder) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def all_of(files: Path, run_dir: Path, **changes):
    return run(load_config(made(files, **changes), {"output_dir": str(run_dir)}), reward_fn=length)


def test_all_begins_with_it_and_the_actor_starts_from_what_it_leaves(files, tmp_path, one_thread):
    # The actor does not move, so that what it is is where it started.
    result = all_of(files, tmp_path / "run", actor_config__lr=0.0)
    assert list(result.stages) == ["PRETRAIN", "ACTOR", "RL"]
    folder = result.stages["PRETRAIN"].checkpoint
    assert folder == tmp_path / "run" / "pretrained"
    pretrained, actor = logits(folder), logits(result.stages["ACTOR"].checkpoint)
    assert torch.equal(pretrained, actor)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["rope_parameters"]["factor"] == 2.0 and saved["max_position_embeddings"] == 64
    assert AutoTokenizer.from_pretrained(folder).chat_template is None
    found = lines(tmp_path / "run", "PRETRAIN")
    assert [row["step"] for row in found if "loss/train" in row] == list(range(1, 7))
    held_out = [row["loss/eval"] for row in found if "loss/eval" in row]
    assert len(held_out) == 2 and held_out[1] < held_out[0] - 0.3
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))  # neither tokens nor scratch
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["PRETRAIN"]
    assert record["model"] == "tiny" and list(record["inputs"]) == [str(files / "play.txt")]
    # Another model is no continuation of this one.
    shutil.rmtree(tmp_path / "run" / "actor")
    other = made(files, actor_config__model=str(folder), actor_config__lr=0.0)
    run(load_config(other, {"output_dir": str(tmp_path / "run")}), type="ACTOR")
    assert torch.equal(logits(tmp_path / "run" / "actor"), pretrained)
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["ACTOR"]
    assert record["model"] == str(folder)


def test_the_loss_is_that_of_predicting_every_token(files, tmp_path, one_thread):
    """By hand: the mean over all tokens but the first of each row, of all rows of the first step."""
    changes = {"pretrain_config__steps": 1, "pretrain_config__lr": 0.0, "pretrain_config__validation_fraction": 0.0}
    changes |= {"pretrain_config__warmup_steps": 0}
    config = load_config(made(files, **changes), {"output_dir": str(tmp_path / "run")})
    folder = run(config, type="PRETRAIN").stages["PRETRAIN"].checkpoint
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [*tokenizer((files / "play.txt").read_text()).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: 4 * 128]).view(4, 128)  # of a text that is longer the first four rows are read
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logprobs = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    want = -logprobs.gather(2, rows[:, 1:, None]).mean().item()
    assert lines(tmp_path / "run", "PRETRAIN")[0]["loss/train"] == pytest.approx(want, rel=1e-5)


def test_without_data_all_is_what_it_was(files):
    plain, given = load_config(settings(files)), load_config(made(files))
    assert plain.stages("ALL") == ["ACTOR", "REWARD", "RL"] and plain.stages("PRETRAIN") == ["PRETRAIN"]
    assert given.stages("ALL") == ["PRETRAIN", "ACTOR", "REWARD", "RL"]
    with pytest.raises(ConfigError, match="pretrain_config.train_dataset_path: no file is named"):
        run(plain, type="PRETRAIN")


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"max_sequence_length": 129}, r"max_sequence_length: 129 tokens are more than the 128 positions of tiny"),
        ({"batch_size": 4, "micro_batch_size": 3}, r"batch_size: 4 is not divisible by micro_batch_size \(3\)"),
        ({"datasets": ["a.jsonl"]}, "train_dataset_path and datasets both say what is read"),
        ({"stepz": 3}, "unknown key 'pretrain_config.stepz'; did you mean 'pretrain_config.steps'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused_before_anything_is_written(files, tmp_path, changes, error):
    tree = made(files)
    tree["pretrain_config"] |= changes
    with pytest.raises(ConfigError, match=error):
        run(load_config(tree, {"output_dir": str(tmp_path / "run")}), type="PRETRAIN")
    assert not (tmp_path / "run").exists()


def test_a_text_that_fills_no_row_is_named(files, tmp_path, one_thread):
    (tmp_path / "short.txt").write_text("too short")
    tree = made(files, pretrain_config__train_dataset_path=str(tmp_path / "short.txt"))
    with pytest.raises(DataError, match=r"train_dataset_path: the text has \d tokens, which do not fill a row of 128"):
        run(load_config(tree, {"output_dir": str(tmp_path / "run")}), type="PRETRAIN")


def test_the_plan_says_how_much_it_reads(files, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(made(files)))
    assert main([str(path), "--dry-run", "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "PRETRAIN: tiny, " in out and "PRETRAIN step: " in out
    assert "6 optimizer steps of 4 rows of 128 tokens" in out and "3,072 tokens in all" in out


# ----- adapters


@pytest.fixture(scope="module")
def base(files, tmp_path_factory) -> Path:
    """A model in its whole weights, unstretched."""
    tree = made(files, actor_config__rope_scaling=None, pretrain_config__max_sequence_length=64)
    run_dir = tmp_path_factory.mktemp("base")
    return run(load_config(tree, {"output_dir": str(run_dir)}), type="PRETRAIN").stages["PRETRAIN"].checkpoint


def adapted(files: Path, base: Path, folder: Path, **actor) -> dict:
    (folder / "peft.yaml").write_text("r: 4\nlora_alpha: 12\nlora_dropout: 0.0\n")
    tree = made(files, pretrain_config__lr=3e-2)
    tree["actor_config"] |= {"model": str(base), "peft_enable": True, "peft_config_path": str(folder / "peft.yaml")}
    tree["actor_config"] |= {"lr": 3e-2, **actor}
    tree["trainer_config"]["actor_lr"] = 3e-2
    return tree | {"output_dir": str(folder / "run")}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


NF4 = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize("bits", [{}, pytest.param(NF4, marks=pytest.mark.slow)], ids=["whole", "nf4"])
def test_the_actor_goes_on_with_the_adapters_of_pretrain(files, base, tmp_path, one_thread, monkeypatch, capsys, bits):
    trainers = []
    train = PPOTrainer.train
    monkeypatch.setattr(PPOTrainer, "train", lambda self, *a: trainers.append(self) or train(self, *a))
    still, moving = (adapted(files, base, tmp_path, **bits, lr=lr, warmup_steps=0) for lr in (0.0, 3e-2))
    run(load_config(still), type="PRETRAIN")
    run(load_config(still), type="ACTOR")
    first, second = (weights(tmp_path / "run" / name) for name in ("pretrained", "actor"))
    assert first.keys() == second.keys()
    for name, weight in first.items():  # on quantized weights TRL trains adapters in bfloat16
        torch.testing.assert_close(second[name].float(), weight, rtol=2**-8 if bits else 0, atol=0)
    assert max(weight.abs().max() for name, weight in first.items() if "lora_B" in name) > 0.01
    run(load_config(moving), type="ACTOR")
    assert "continues with the adapters of PRETRAIN" in capsys.readouterr().out
    actor = tmp_path / "run" / "actor"
    after = weights(actor)
    assert any((after[name] - first[name]).abs().max() > 0.01 for name in after)
    for name in ("pretrained", "actor"):
        assert base_of(str(tmp_path / "run" / name)) == str(base.resolve())
        assert json.loads((tmp_path / "run" / name / BASE_CONFIG).read_text())["rope_parameters"]["factor"] == 2.0
    if not bits:
        return
    # RL is regularized to the fine-tuned actor: base, with stretched positions, and adapters as ACTOR left them.
    run(load_config(adapted(files, base, tmp_path)), type="RL", reward_fn=length)
    policy, reference = trainers[-1].updater.actor_critic.policy, trainers[-1].scorer.reference.model
    stretched = AutoModelForCausalLM.from_pretrained(actor, config=policy.config, dtype=torch.float32).eval()
    with torch.no_grad():
        held_to = reference(input_ids=IDS).logits
        torch.testing.assert_close(held_to, stretched(input_ids=IDS).logits, rtol=0, atol=1e-5)
        assert (policy(input_ids=IDS).logits - held_to).abs().max() > 1e-3


@pytest.mark.slow
def test_adapters_go_upon_a_pretrained_model_in_its_whole_weights(files, base, tmp_path, one_thread):
    run(load_config(adapted(files, base, tmp_path, peft_enable=False)), type="PRETRAIN")
    result = run(load_config(adapted(files, base, tmp_path)), type="ACTOR").stages["ACTOR"]
    pretrained = tmp_path / "run" / "pretrained"
    assert base_of(str(result.checkpoint)) == str(pretrained.resolve())
    assert (logits(result.checkpoint) - logits(pretrained)).abs().max() > 1e-3
    # A run that is moved finds it again.
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert base_of(str(tmp_path / "moved" / "actor")) == str((tmp_path / "moved" / "pretrained").resolve())


@pytest.mark.slow
def test_adapters_of_pretrain_are_merged_where_the_actor_is_trained_whole(files, base, tmp_path, one_thread):
    config = adapted(files, base, tmp_path, rope_scaling=None, max_sequence_length=64)
    config["pretrain_config"]["max_sequence_length"] = 64
    run(load_config(config), type="PRETRAIN")
    pretrained = logits(tmp_path / "run" / "pretrained")
    config["actor_config"] |= {"peft_enable": False, "peft_config_path": None, "lr": 0.0}
    run(load_config(config), type="ACTOR")
    torch.testing.assert_close(logits(tmp_path / "run" / "actor"), pretrained, rtol=0, atol=1e-4)
    assert (tmp_path / "run" / "actor" / "model.safetensors").exists()


@pytest.mark.slow
def test_without_an_actor_rl_starts_from_what_pretrain_has_left(files, tmp_path, one_thread, capsys):
    config = load_config(made(files, trainer_config__actor_lr=0.0), {"output_dir": str(tmp_path / "run")})
    run(config, type="PRETRAIN")
    run(config, type="RL", reward_fn=length)
    assert "the policy starts from the pretrained model as it is" in capsys.readouterr().out
    torch.testing.assert_close(
        logits(tmp_path / "run" / "actor_rl"), logits(tmp_path / "run" / "pretrained"), rtol=0, atol=1e-2
    )


@pytest.mark.slow
def test_a_scaling_that_the_adapters_do_not_know_is_warned_of(files, base, tmp_path, one_thread, capsys):
    run(load_config(adapted(files, base, tmp_path)), type="PRETRAIN")
    other = adapted(files, base, tmp_path, rope_scaling={"type": "linear", "factor": 4})
    capsys.readouterr()
    run(load_config(other), type="ACTOR")
    out = " ".join(capsys.readouterr().out.split())
    assert "its adapters were trained on rotary positions 'linear' (factor 2" in out and "factor 4" in out


# ----- stopped, and by several processes


@pytest.fixture(scope="module")
def config_file(files) -> Path:
    path = files / "config.yaml"
    path.write_text(yaml.safe_dump(made(files)))
    return path


@pytest.fixture(scope="module")
def undisturbed(config_file, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    status, _, err = finish(start(str(config_file), "--output-dir", str(run_dir), "--type", "PRETRAIN"))
    assert status == 0, err
    return run_dir


def left(run_dir: Path) -> dict:
    (run_dir / "samples.jsonl").touch()
    found = left_behind(run_dir)
    return found | {"pretrained": (run_dir / "pretrained" / "model.safetensors").read_bytes()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, calls",
    [
        ("SIGKILL", 2),
        pytest.param("SIGKILL", 5, marks=pytest.mark.nightly),
        pytest.param("SIGTERM", 4, marks=pytest.mark.nightly),
    ],
)
def test_a_run_that_was_stopped_ends_with_the_same_bytes(config_file, undisturbed, tmp_path, name, calls):
    words = (str(config_file), "--output-dir", str(tmp_path / "run"), "--type", "PRETRAIN")
    status, _, err = finish(start(*words, code=signal_at("trainer.log", signal.Signals[name], calls)))
    assert status == (-signal.SIGKILL if name == "SIGKILL" else 128 + signal.SIGTERM), err
    status, _, err = finish(start(*words, "--resume"))
    assert status == 0, err
    assert differences(left(tmp_path / "run"), left(undisturbed)) == []


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(config_file, undisturbed, tmp_path):
    words = (str(config_file), "--output-dir", str(tmp_path / "run"), "--type", "PRETRAIN")
    status, _, err = finish(start(*words, ranks=2))
    assert status == 0, err
    two, one = (lines(each, "PRETRAIN") for each in (tmp_path / "run", undisturbed))
    assert [row["step"] for row in two] == [row["step"] for row in one]
    for first, second in zip(two, one, strict=True):
        for name in ("loss/train", "loss/eval"):
            assert first.get(name) == (None if name not in second else pytest.approx(second[name], rel=1e-4))
    assert "pretrained" in {path.name for path in (tmp_path / "run").iterdir()}
