"""What whole runs start from: a user's files, and a run whose actor is trained already."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from small_run import settings, write_files

from chatrlhf import load_config, run
from chatrlhf.rl.ppo import PPOTrainer


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    write_files(folder)
    return folder


@pytest.fixture(scope="module")
def fine_tuned(files, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("sft") / "run"
    run(load_config(settings(files), {"output_dir": str(run_dir)}), type="ACTOR")
    return run_dir


@pytest.fixture
def sft(fine_tuned, tmp_path) -> Path:
    """A run whose actor has been fine-tuned, and no more."""
    return shutil.copytree(fine_tuned, tmp_path / "sft")


@pytest.fixture
def trainers(monkeypatch) -> list[PPOTrainer]:
    """The trainers of the RL stages that run."""
    seen = []
    train = PPOTrainer.train
    monkeypatch.setattr(PPOTrainer, "train", lambda self, *args: seen.append(self) or train(self, *args))
    return seen
