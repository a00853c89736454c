"""`manifest.json`: what a run has done, from which inputs, with which settings and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chatrlhf.config.schema import Config
from chatrlhf.errors import CheckpointError
from chatrlhf.runtime.atomic_files import write_atomically
from chatrlhf.runtime.collectives import barrier, gather_objects, is_main
from chatrlhf.runtime.run_log import METRICS, SAMPLES

FILE_NAME = "manifest.json"
_RESTORE = "restore it, or use another output_dir"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
# Where each stage leaves its results.
OUTPUTS = {"PRETRAIN": ("pretrained",), "ACTOR": ("actor",), "REWARD": ("reward",), "RL": ("actor_rl", "critic")}


@dataclass
class Manifest:
    """The record of one output folder."""

    run_dir: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def open(run_dir: Path, resume: bool) -> Manifest:
        """The folder's manifest, or a new one.

        Raises:
            CheckpointError: ``resume`` is asked for and there is no run to go on with.
        """
        path = run_dir / FILE_NAME
        if not path.exists():
            if resume:
                raise CheckpointError(f"--resume: no run in {run_dir} ({FILE_NAME} is missing); leave --resume out")
            return Manifest(run_dir)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # neither text nor JSON, or lists that are too deep
            raise CheckpointError(f"{path}: it cannot be read as JSON ({error}); {_RESTORE}") from None
        if not _is_record(stored):
            raise CheckpointError(f"{path}: it is JSON, but no record of a run; {_RESTORE}")
        facts = stored.get("facts", {}) if resume else {}
        return Manifest(run_dir, stored.get("stages", {}), stored.get("config", {}), facts)

    def begin(self, config: Config, stages: list[str]) -> None:
        """Write the settings of this run down."""
        self.config = config.model_dump(mode="json")
        self._save(asked=stages)

    def fact(self, name: str, make: Callable[[], Any]) -> Any:
        """A value of the run that --resume keeps: what ``make`` gave when it was first asked for, as JSON has it.

        All ranks ask for it, and have rank 0's.
        """
        if name not in self.facts:
            self.facts[name] = gather_objects(make())[0]
            self._save()
        return self.facts[name]

    def is_done(self, stage: str) -> bool:
        return self.stages.get(stage, {}).get("status") == "done"

    def has_begun(self, stage: str) -> bool:
        """Whether there is anything of a stage to continue from, or to keep."""
        return stage in self.stages or any((self.run_dir / "checkpoints" / stage).glob("step-*"))

    def start(self, stage: str, made_from: dict[str, Any], settings: dict[str, Any]) -> None:
        """Write down that a stage trains now, from what and by which settings: a later --resume compares them.

        Args:
            made_from: hashes, see `stages/sources.py`.
            settings: the keys that the stage reads, dotted.
        """
        known = self.stages.get(stage, {}) | {"made_from": made_from, "settings": settings}
        self.stages[stage] = {"status": "begun"} | {name: each for name, each in known.items() if name != "status"}
        self._save()

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Mark a stage as done; its outputs are in place. Every rank continues with rank 0's record."""
        begun = {name: each for name, each in self.stages.get(stage, {}).items() if name in ("made_from", "settings")}
        self.stages[stage] = {"status": "done", "finished_at": _now(), **record, **begun}
        self._save()
        barrier()
        if not is_main():
            self.stages = Manifest.open(self.run_dir, resume=True).stages

    def set_aside(self, stage: str, note: Callable[[str], None]) -> None:
        """Before a stage starts afresh, move what an earlier run of it left into ``previous/``; nothing is deleted."""
        barrier()  # others may still be reading
        if is_main():
            self._set_aside(stage, note)
        barrier()
        self.stages.pop(stage, None)

    def _set_aside(self, stage: str, note: Callable[[str], None]) -> None:
        left = [self.run_dir / name for name in (*OUTPUTS[stage], f"checkpoints/{stage}")]
        left = [path for path in left if path.exists()]
        if not left:
            self.stages.pop(stage, None)
            return
        number = 1
        while (target := self.run_dir / "previous" / f"{stage}-{number}").exists():
            number += 1
        target.mkdir(parents=True)
        for path in left:
            path.rename(target / path.name)
        for name in (METRICS, SAMPLES, FILE_NAME):
            if (self.run_dir / name).exists():
                shutil.copy2(self.run_dir / name, target / name)
        self.stages.pop(stage, None)
        self._save()
        note(f"{stage}: results of an earlier run were moved to {target} (--resume continues with a run instead)")

    def _save(self, **extra: Any) -> None:
        if not is_main():
            return
        stored = {
            "stages": self.stages,
            "config": self.config,
            "facts": self.facts,
            "seed": self.config.get("seed"),
            "versions": {name: _version(name) for name in ("chatrlhf", *PACKAGES)}
            | {"python": platform.python_version()},
            "updated_at": _now(),
            **extra,
        }
        write_atomically(self.run_dir / FILE_NAME, json.dumps(stored, indent=2, ensure_ascii=False) + "\n")


def _is_record(stored: Any) -> bool:
    """Whether JSON has the shape that `_save` writes, as far as it is read again."""
    parts = ("config", "stages", "facts")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part, {}), dict) for part in parts):
        return False
    return all(
        isinstance(stage, dict)
        and isinstance(stage.get("output", ""), str)
        and isinstance(stage.get("metrics", {}), dict)
        and (stage.get("status") != "done" or {"output", "metrics"} <= stage.keys())
        for stage in stored.get("stages", {}).values()
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
