"""A whole run small enough for a test: files, configuration, the command line in a process, what it left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def signal_at(place: str, number: int, call: int, rank: int | None = None) -> str:
    """Code for `start`: at the ``call``-th time that a process (of a rank) is at a place, a signal to itself."""
    return f"""
import os
from chatrlhf.runtime import fault_points
if os.environ.get("RANK") in {(None if rank is None else str(rank),)}:
    fault_points.at("{place}", lambda *facts: os.kill(os.getpid(), {int(number)}), {call})
"""


GREETINGS = ("hello there", "good day", "how are you", "what is new", "who is it", "where to", "see you", "thank you")


def write_files(folder: Path, rows: int = 60) -> None:
    """The three datasets in ChatLLaMA's shapes, and preference pairs."""
    texts = [f"{GREETINGS[i % len(GREETINGS)]} {i // len(GREETINGS)}" for i in range(rows)]
    replies = [f"well {text}" if i % 2 else f"no {i % 5}" for i, text in enumerate(texts)]
    actor = [{"user_input": a, "completion": b} for a, b in zip(texts, replies, strict=True)]
    reward = [row | {"score": float(i % 2) + (i % 5) / 10} for i, row in enumerate(actor)]
    pairs = [{"user_input": a, "chosen": f"well {a}", "rejected": f"no {i % 5}"} for i, a in enumerate(texts)]
    prompts = [{"user_input": a} for a in texts]
    for name, content in (("actor", actor), ("reward", reward), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def length(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function."""
    return [float(len(completion)) for completion in completions]


def settings(folder: Path) -> dict[str, Any]:
    """A configuration of three short stages with every kind of state: schedules, adaptive KL, running scale."""
    stage = {
        "lr": 3e-3,
        "batch_size": 8,
        "epochs": 1,
        "checkpoint_steps": 3,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
    }
    return {
        "seed": 5,
        "num_threads": 1,
        "guards_config": {"allow_untrained_actor": True},  # seven steps are few
        "actor_config": {
            "model": "tiny",
            "tiny": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 96,
            },
            "train_dataset_path": str(folder / "actor.json"),
            "max_sequence_length": 96,
            **stage,
        },
        "reward_config": {"train_dataset_path": str(folder / "reward.json"), **stage},
        "trainer_config": {
            "examples_path": str(folder / "prompts.json"),
            "total_episodes": 48,
            "precision": "fp32",  # not what this machine happens to be fast in
            "num_rollouts": 8,
            "batch_size": 4,
            "ppo_epochs": 2,
            "actor_lr": 1e-3,
            "critic_lr": 1e-3,
            "gen_kwargs": {"max_new_tokens": 8},
            "checkpoint_steps": 2,
            "eval_interval": 3,
            "scale_reward": "running",
            "target": 0.5,
            "horizon": 50,
        },
    }


def policy_of(trainer: Any) -> Any:
    """The model that a `PPOTrainer` trains."""
    return trainer.updater.actor_critic.policy


def reference_of(trainer: Any) -> Any:
    """The model that it is regularized to."""
    return trainer.scorer.reference.model


def write_config(folder: Path, **changes: Any) -> Path:
    """`config.yaml` in ``folder``; changes are dotted keys with ``__`` for the dot."""
    tree = settings(folder)
    for key, value in changes.items():
        *parents, last = key.split("__")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def start(*words: str, code: str | None = None, ranks: int = 1) -> subprocess.Popen[str]:
    """The command line in a process of its own, or in several by torchrun; ``code`` runs in it first."""
    program = [str(ROOT / "main.py")]
    if code:
        program = ["-c", code + "\nfrom chatrlhf.cli import main\nraise SystemExit(main())"]
    if ranks > 1:
        program = [*TORCHRUN, str(ranks), "--no-python", sys.executable, *program]
    return start_python(*program, *words)


def start_python(*words: str) -> subprocess.Popen[str]:
    """Python in a process of its own."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finish(process: subprocess.Popen[str], timeout: float = 300) -> tuple[int, str, str]:
    """Exit status, standard output and standard error. What hangs is ended, its ranks too, and is an error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its ranks, by force after half a minute
        process.communicate(timeout=60)
        raise
    return process.returncode, out, err


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """A run's manifest without its checksum, as of an earlier version: so it may be written with changes."""
    stored = json.loads((run_dir / "manifest.json").read_text())
    stored.pop("sha256", None)
    return stored


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a log, without how long things took."""
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k != "tokens/s"} for row in rows]


def left_behind(run_dir: Path) -> dict[str, Any]:
    """All that must not depend on interruptions: the bytes of every weight and state file, metrics, samples."""
    found: dict[str, Any] = {}
    newest = [sorted(stage.glob("step-*"))[-1] for stage in sorted((run_dir / "checkpoints").glob("[A-Z]*"))]
    for folder in [run_dir / name for name in ("actor", "reward", "actor_rl", "critic")] + newest:
        for path in sorted(folder.rglob("*")) if folder.exists() else []:
            if path.suffix in (".safetensors", ".pt", ".pth"):
                found[str(path.relative_to(run_dir))] = path.read_bytes()
            if path.name == "state.json":
                found[str(path.relative_to(run_dir))] = json.loads(path.read_text())
    for name in ("metrics.jsonl", "samples.jsonl"):
        found[name] = records(run_dir, name)
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which two runs left different things."""
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))
