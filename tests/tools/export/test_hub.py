"""Uploads: asked for alone, private unless asked otherwise, with the token of the environment, and honest cards."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
import yaml
from standins.hub_server import hub_server
from tiny import llama

from chatrlhf.cli import main
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.tools.export.model_card import model_card
from chatrlhf.tools.export.provenance import ORIGIN, origin_of

TOKEN = "hf_never_to_be_seen"


@pytest.fixture
def hub(monkeypatch):
    with hub_server(TOKEN) as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def write_model(folder):
    llama(vocab=258).save_pretrained(folder)
    train_tokenizer(["a"], 258).save_pretrained(folder)


@pytest.fixture
def run_dir(tmp_path):
    """What a run of two stages leaves: an actor, its RL version, a manifest."""
    run = tmp_path / "run"
    for name in ("actor", "actor_rl"):
        publish_folder(run / name, write_model)
    done = {"status": "done", "finished_at": "2026-11-22T00:00:00+00:00", "model": "facebook/opt-1.3b"}
    actor = done | {"inputs": {"/home/me/secret/actor.json": "ab" * 32}, "rows": {"train": 1234, "held_out": 10}}
    actor |= {"metrics": {"loss/eval": 1.98765}}
    rl = done | {"inputs": {}, "metrics": {"reward/mean": 4.5}}
    settings = {"actor_config": {"lr": 1e-5, "epochs": 2, "model_folder": "/home/me/secret"}}
    settings["trainer_config"] = {"init_kl_coef": 0.1, "datasets": [{"name": "oasst1"}, {"name": "/home/me/mine.csv"}]}
    manifest = {"stages": {"ACTOR": actor, "RL": rl, "REWARD": {"status": "begun"}}, "config": settings, "seed": 5}
    (run / "manifest.json").write_text(json.dumps(manifest | {"versions": {"torch": "2.13.0", "trl": None}}))
    return run


def test_a_damaged_folder_is_not_pushed(hub, run_dir, capsys):
    (run_dir / "actor" / "generation_config.json").write_text("{}")
    assert main(["export", "push", str(run_dir / "actor"), "me/mine"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "generation_config.json has" in said and not hub.files


def test_a_run_is_pushed_private_and_whole_with_a_card_of_its_manifest(hub, run_dir, capsys):
    assert main(["export", "push", str(run_dir / "actor_rl"), "me/mine"]) == 0
    assert f"to {hub.url}/me/mine (private)" in capsys.readouterr().out
    assert hub.private == {"me/mine": True}
    pushed = hub.files["me/mine"]
    for path in (run_dir / "actor_rl").iterdir():
        if path.name != "contents.json":
            assert pushed.pop(path.name) == path.read_bytes()
    card = pushed.pop("README.md").decode()
    assert set(pushed) == {".gitattributes"}
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "facebook/opt-1.3b" and head["datasets"] == ["OpenAssistant/oasst1"]
    for fact in ("ACTOR", "train 1,234", "actor.json (SHA-256 abababababab...)", "loss/eval 1.988", "lr 1e-05",
                 "init kl coef 0.1", "mine.csv", "torch 2.13.0", "reward/mean 4.5", "2026-11-22"):  # fmt: skip
        assert fact in card
    assert "REWARD" not in card and "secret" not in card and "/home" not in card and "trl None" not in card
    assert not (run_dir / "actor_rl" / "README.md").exists()  # nothing is written into the user's folder
    assert origin_of(run_dir / "actor")["run"]["stages"].keys() == {"ACTOR"}


def test_an_export_is_pushed_where_the_flag_is_given_and_knows_its_run(hub, run_dir, tmp_path, capsys):
    llama(seed=1, vocab=258).save_pretrained(tmp_path / "base")
    words = ["export", "delta", "--base", str(tmp_path / "base"), "--target", str(run_dir / "actor_rl"), "--output"]
    assert main([*words, str(tmp_path / "quiet"), "--public"]) == 2
    assert "--public: it goes with --push-to-hub" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "quiet")]) == 0
    assert hub.requests == []
    assert main([*words, str(tmp_path / "told"), "--push-to-hub", "me/delta", "--public"]) == 0
    assert hub.private == {"me/delta": False}
    pushed = hub.files["me/delta"]
    assert pushed["delta.json"] == (tmp_path / "told" / "delta.json").read_bytes()
    card = pushed["README.md"].decode()
    assert "as the difference to base" in card and "init kl coef 0.1" in card
    assert "secret" not in pushed[ORIGIN].decode()
    again = ["--base", str(tmp_path / "base"), "--delta", str(tmp_path / "told"), "--output", str(tmp_path / "again")]
    assert main(["export", "apply-delta", *again]) == 0
    whats = [step["what"] for step in origin_of(tmp_path / "again")["steps"]]
    assert whats == ["as the difference to base", "put together with base"]


def test_what_is_there_stays_unless_somebody_says_otherwise(hub, run_dir, capsys):
    folder = run_dir / "actor"
    assert main(["export", "push", str(folder), "me/mine"]) == 0
    hub.files["me/mine"]["README.md"] = b"mine"
    assert main(["export", "push", str(folder), "me/mine"]) == 2
    assert "holds" in (said := capsys.readouterr().err) and "add --update" in said
    assert main(["export", "push", str(folder), "me/mine", "--update"]) == 0
    assert hub.files["me/mine"]["README.md"] == b"mine"
    hub.private["me/mine"] = False
    assert main(["export", "push", str(folder), "me/mine", "--update"]) == 2
    assert "is there and public" in capsys.readouterr().err
    (folder / "README.md").write_text("my own card")
    assert main(["export", "push", str(folder), "me/other"]) == 0
    assert hub.files["me/other"]["README.md"] == b"my own card"


def test_the_token_comes_from_the_environment_and_is_never_shown(hub, run_dir, tmp_path, monkeypatch, capsys):
    words = ["export", "push", str(run_dir / "actor"), "me/mine"]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    assert main(words) == 2
    said = capsys.readouterr()
    assert "--push-to-hub: me/mine" in said.err and "hf_wrong_one" not in said.err + said.out
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.read_only = True
    assert main(words) == 2
    said = capsys.readouterr()
    assert "*** may not write" in said.err and TOKEN not in said.err + said.out
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text(TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    before = len(hub.requests)
    assert main(words) == 2
    assert "set HF_TOKEN to a token" in capsys.readouterr().err
    assert len(hub.requests) == before and hub.files == {}


def test_checks_come_before_the_work(hub, run_dir, tmp_path, monkeypatch, capsys):
    missing = ["export", "merge", "--model", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_one")
    assert main([*missing, "--push-to-hub", "me/mine"]) == 2
    assert "--push-to-hub" in capsys.readouterr().err  # and not that there are no adapters
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([*missing, "--push-to-hub", "me//mine"]) == 2
    assert "is no name of a repository" in capsys.readouterr().err
    assert main(["export", "push", str(tmp_path), "me/mine"]) == 2
    assert "has no weights" in capsys.readouterr().err
    assert hub.files == {}
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["export", "push", str(run_dir / "actor"), "me/mine"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["export", "push", str(run_dir / "actor"), "me/mine"]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_weights_of_which_nothing_is_known_get_a_card_that_says_so(run_dir, tmp_path):
    shutil.copytree(run_dir / "actor", tmp_path / "alone" / "actor")
    origin = origin_of(tmp_path / "alone" / "actor")
    assert origin == {"run": {}, "steps": []}
    card = model_card("me/mine", origin, adapters=True)
    assert "how they were trained is not known here" in card and "library_name: peft" in card
