"""A folder in which everything is right, to be damaged, and the command line on a copy of it."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import tiny
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from chatrlhf.cli import main

ROOT = Path(__file__).resolve().parents[2]
OURS = ("done/manifest.json", "done/metrics.jsonl")  # which each run of this folder writes


@dataclass(frozen=True)
class Case:
    """One malformed input, and how the command line is asked to read it."""

    name: str
    owner: str
    damage: Callable[[Path], None]  # to a folder
    words: tuple[str, ...]
    says: tuple[str, ...]


@contextlib.contextmanager
def sound_folder() -> Iterator[Path]:
    """A folder to copy for each case, in a place of its own."""
    with tempfile.TemporaryDirectory() as place:
        sound = Path(place) / "sound"
        sound.mkdir()
        write_sound(sound)
        yield sound


def write_sound(folder: Path) -> None:
    """A folder in which everything is right: a model, adapters, data of all kinds, a configuration, a run."""
    tokenizer = tiny.tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    for name in ("base", "judge"):
        model = tiny.llama(vocab=len(tokenizer), **ids)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "base/chat_template.jinja").write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    rows = [{"user_input": f"the cat {i}", "completion": f"on the mat {i}"} for i in range(4)]
    pairs = [{"user_input": row["user_input"], "chosen": row["completion"], "rejected": "a hat"} for row in rows]
    for name, content in (("a", rows), ("r", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "a.csv").write_text("user_input,completion\n" + "".join(f"the cat {i},on the mat\n" for i in range(4)))
    (folder / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    write_parquet(folder / "a.parquet", rows)
    (folder / "text.txt").write_text("the cat sat on the mat " * 40)
    (folder / "own.jinja").write_text((folder / "base/chat_template.jinja").read_text())
    (folder / "peft.yaml").write_text("r: 4\nlora_alpha: 8\n")
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "templates.json").write_text('{"rlhf": "Write one more request."}')
    (folder / "topics.txt").write_text("cats\nhats\n")
    (folder / "rewarding.py").write_text("def score(p, c):\n    return [float(len(x)) for x in c]\n")
    (folder / "c.yaml").write_text(yaml.safe_dump(settings(folder)))
    write_adapters(folder / "adapters", folder / "base", tokenizer)
    with inside(folder), contextlib.redirect_stdout(io.StringIO()):
        assert main(["c.yaml", "--output-dir", "done"]) == 0


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_adapters(path: Path, base: Path, tokenizer: Any) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def settings(folder: Path) -> dict[str, Any]:
    stage = {"batch_size": 4, "max_sequence_length": 32, "validation_fraction": 0, "lr": 1e-3, "precision": "fp32"}
    return {
        "output_dir": "run",
        "num_threads": 1,
        "actor_config": {"model": "base", "train_dataset_path": "a.jsonl", **stage},
        "reward_config": {"model": "actor", "train_dataset_path": "r.jsonl", **stage},
        "trainer_config": {
            "examples_path": "a.jsonl",
            "total_episodes": 4,
            "num_rollouts": 4,
            "batch_size": 4,
            "validation_fraction": 0,
            "precision": "fp32",
            "gen_kwargs": {"max_new_tokens": 4},
        },
    }


@dataclass
class Outcome:
    status: object
    said: str
    changed: list[str]
    seconds: float

    def faults(self, case: Case) -> list[str]:
        found = []
        if "Traceback (most recent call last)" in self.said:
            found.append("traceback")
        if self.status != 2:
            found.append(f"status {self.status}")
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        if not lines or not any(word in lines[-1] for word in case.says):
            found.append(f"names none of {case.says}")
        return found + [f"changed {name}" for name in self.changed]


def contents(folder: Path) -> dict[str, bytes | str]:
    """Everything in a folder, by its name."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def command(name: str) -> Callable[[list[str]], int]:
    """The command line, or a script's."""
    if name.endswith(".py"):
        spec = importlib.util.spec_from_file_location("script", ROOT / name)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.main
    return main


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """The working directory is ``folder``; modules of its own are forgotten afterwards."""
    here, path, modules = os.getcwd(), list(sys.path), set(sys.modules)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)
        sys.path[:] = path
        for name in [name for name in set(sys.modules) - modules if name.startswith("rewarding")]:
            del sys.modules[name]


def run(case: Case, sound: Path) -> Outcome:
    """Run a case in a copy of a sound folder."""
    folder = sound.parent / "case"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder, symlinks=True)
    case.damage(folder)
    before, out, start = contents(folder), io.StringIO(), time.perf_counter()
    first, *rest = case.words
    words = rest if first.endswith(".py") else list(case.words)
    with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status: object = command(first)(words)
        except SystemExit as end:  # argparse's
            status = end.code
        except BaseException:
            traceback.print_exc()
            status = "an exception"
    after = contents(folder)
    changed = [name for name in before if after.get(name) != before[name] and name not in OURS]
    return Outcome(status, out.getvalue(), changed, time.perf_counter() - start)
