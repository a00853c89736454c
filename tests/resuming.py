"""Runs that are stopped, and how far they get when they are resumed: in this process, a second or so each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_run import settings, write_files
from tiny import llama, tokenizer

from chatrlhf import load_config, run
from chatrlhf.config import Config
from chatrlhf.errors import Interrupted
from chatrlhf.runtime import fault_points

REWARDED = """
def length(prompts, completions):
    return [float(len(completion)) for completion in completions]
"""


class Ready(Exception):
    """A resumed trainer, before its first step."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer


def base_model(folder: Path, seed: int = 0) -> Path:
    """A model with its tokenizer, for `actor_config.model`."""
    words = tokenizer()
    llama(seed, vocab=len(words), max_position_embeddings=96).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def write_case(folder: Path, monkeypatch: pytest.MonkeyPatch | None = None) -> dict[str, Any]:
    """The files of a run and its configuration, with a model and a reward function of its own."""
    write_files(folder)
    (folder / "text.txt").write_text("the cat sat on the mat, the hat of the cat is on the mat. " * 60)
    (folder / f"judge_{folder.name}.py").write_text(REWARDED)
    tree = settings(folder)
    text = {"train_dataset_path": str(folder / "text.txt"), "max_sequence_length": 16, "steps": 6}
    tree["pretrain_config"] = tree["reward_config"] | text
    del tree["pretrain_config"]["epochs"]
    tree["actor_config"] |= {"model": str(base_model(folder / "base")), "epochs": 2, "template": "raw"}
    tree["output_dir"] = str(folder / "run")
    return tree


def configured(tree: dict[str, Any], **changes: Any) -> Config:
    """``changes`` are dotted keys with ``__`` for the dot."""
    return load_config(tree, {key.replace("__", "."): value for key, value in changes.items()})


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """Inside, a stage gets a SIGTERM in its optimizer step (of RL: its step) of this number."""

    def signalled(step: int) -> None:
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    with ExitStack() as stack:
        for place in ("trainer.step", "rl.step"):
            stack.callback(fault_points.at(place, signalled))
        yield


def stop(config: Config, stage: str, steps: int, resume: bool = False) -> None:
    """Run a stage up to a step."""
    with stopped_after(steps), pytest.raises(Interrupted):
        run(config, type=stage, resume=resume)


def resumed(config: Config, stage: str) -> Any:
    """The trainer of a resumed stage with the checkpoint in it, before its first step."""
    from transformers import Trainer

    def ready(trainer: Any, **rest: Any) -> None:
        raise Ready(trainer)

    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(fault_points.at("rl.steps", ready))
        patch.setattr(Trainer, "_run_epoch", ready)
        with pytest.raises(Ready) as raised:
            run(config, type=stage, resume=True)
    return raised.value.trainer
