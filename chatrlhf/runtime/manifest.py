"""`manifest.json`: what a run has done, from which inputs, with which settings and versions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chatrlhf.config.schema import Config
from chatrlhf.errors import CheckpointError, LockedError
from chatrlhf.errors.redaction import redacted_tree
from chatrlhf.runtime.atomic_files import WRITING, write_atomically
from chatrlhf.runtime.collectives import barrier, gather_objects, is_main
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.provenance import code, hardware, versions
from chatrlhf.runtime.run_log import METRICS, SAMPLES

FILE_NAME, PREVIOUS = "manifest.json", "previous"
CALLS = "calls"  # that trained a stage, by their numbers
KEPT = ("made_from", "settings", CALLS)  # of a stage, from its beginning
_RESTORE = "restore it, or use another output_dir"
# Where each stage leaves its results.
OUTPUTS = {"PRETRAIN": ("pretrained",), "ACTOR": ("actor",), "REWARD": ("reward",), "RL": ("actor_rl", "critic")}


@dataclass
class Manifest:
    """The record of one output folder."""

    run_dir: Path
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    # Of each call of the command that stages were trained by, under a number that counts up: settings, code, hardware.
    calls: dict[str, dict[str, Any]] = field(default_factory=dict)
    moving: dict[str, str] = field(default_factory=dict)  # stages that are being set aside, and their folders' names
    as_read: bytes | None = None  # the file, when it was opened

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
            content = path.read_bytes()
            stored = json.loads(content.decode("utf-8"))
        except (OSError, ValueError, RecursionError) as error:  # neither text nor JSON, or lists that are too deep
            raise CheckpointError(f"{path}: it cannot be read as JSON ({error}); {_RESTORE}") from None
        if not _is_record(stored):
            raise CheckpointError(f"{path}: it is JSON, but no record of a run; {_RESTORE}")
        facts = stored.get("facts", {}) if resume else {}
        parts = (stored.get(part, {}) for part in ("stages", "config"))
        return Manifest(run_dir, *parts, facts, stored.get("calls", {}), stored.get("moving", {}), content)

    def refuse_changes(self) -> None:
        """A LockedError where another process has written the manifest since it was opened."""
        path = self.run_dir / FILE_NAME
        if (path.read_bytes() if path.exists() else None) != self.as_read:
            raise LockedError(
                f"output_dir: another run has written into {self.run_dir} while this one was starting; look what it "
                "has left, then start this one again"
            )

    def begin(self, config: Config, stages: list[str], reward: str | None = None) -> None:
        """Write the settings of this run down, and what it is run by; of earlier calls those that left a stage.

        Args:
            reward: the name of a reward function that Python code has given.
        """
        self.config = config.model_dump(mode="json")
        needed = {number for stage in self.stages.values() for number in stage.get(CALLS, [])}
        number = 1 + max(map(int, self.calls), default=0)
        self.calls = {name: call for name, call in self.calls.items() if name in needed} | {
            str(number): {
                "asked": stages,
                "started_at": _now(),
                "code": code(),
                "versions": versions(),
                "hardware": hardware(config.num_threads),
                "config_folder": None if config.base_dir is None else str(config.base_dir),
                "working_directory": os.getcwd(),
                "reward_given": reward,
                # As it was written: what is left out has this version's defaults.
                "config": config.model_dump(mode="json", exclude_unset=True),
            }
        }
        self._save(asked=stages)

    def fact(self, name: str, make: Callable[[], Any]) -> Any:
        """A value of the run that --resume keeps: what ``make`` gave when it was first asked for, as JSON has it.

        All ranks ask for it, and have rank 0's.
        """
        if name not in self.facts:
            self.facts[name] = gather_objects(make())[0]
            self._save()
        return self.facts[name]

    def metrics(self, stage: str) -> dict[str, float]:
        """The last metrics of a stage that is done; none of another."""
        return self.stages.get(stage, {}).get("metrics", {})

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
        if self.calls:
            known[CALLS] = [*known.get(CALLS, []), max(self.calls, key=int)]
        self.stages[stage] = {"status": "begun"} | {name: each for name, each in known.items() if name != "status"}
        self._save()

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Mark a stage as done; its outputs are in place. Every rank continues with rank 0's record."""
        begun = {name: each for name, each in self.stages.get(stage, {}).items() if name in KEPT}
        self.stages[stage] = {"status": "done", "finished_at": _now(), **record, **begun}
        self._save()
        barrier()
        if not is_main():
            self.stages = Manifest.open(self.run_dir, resume=True).stages

    def set_aside(self, stages: list[str], note: Callable[[str], None]) -> None:
        """Before stages start afresh, move what earlier runs of them left into ``previous/``; nothing is deleted.

        It is one transaction. From its one write on, the manifest knows these stages no more, and whoever opens it
        after a kill makes the moves that were left (`finish_moves`): a folder in ``previous/`` is whole or absent.
        """
        barrier()  # others may still be reading
        left = [stage for stage in stages if self._left_by(stage)] if is_main() else []
        targets = {stage: self._copy_logs(stage) for stage in left}
        for stage in stages:
            self.stages.pop(stage, None)
        if targets:
            self.moving = targets
            self._save()
            self.finish_moves()
            for stage, name in targets.items():
                place = self.run_dir / PREVIOUS / name
                note(
                    f"{stage}: results of an earlier run were moved to {place} (--resume continues with a run instead)"
                )
        barrier()

    def finish_moves(self) -> None:
        """Make the moves that `set_aside` has written down; one process does."""
        if not self.moving:
            return
        for stage, name in self.moving.items():
            place = self.run_dir / PREVIOUS / name
            writing = place.with_name(f"{WRITING}{name}")
            if writing.exists():
                for path in self._left_by(stage):
                    path.rename(writing / path.name)
                reached("manifest.set_aside", place)
                writing.rename(place)
        self.moving = {}
        self._save()

    def _left_by(self, stage: str) -> list[Path]:
        left = [self.run_dir / name for name in (f"checkpoints/{stage}", *OUTPUTS[stage])]
        return [path for path in left if path.exists()]

    def _copy_logs(self, stage: str) -> str:
        """Begin the folder for what a stage has left: with what the run has said. Returns its name."""
        previous, number = self.run_dir / PREVIOUS, 1
        while (previous / f"{stage}-{number}").exists():
            number += 1
        writing = previous / f"{WRITING}{stage}-{number}"
        shutil.rmtree(writing, ignore_errors=True)  # of a kill before anything was moved
        writing.mkdir(parents=True)
        for name in (METRICS, SAMPLES, FILE_NAME):
            if (self.run_dir / name).exists():
                shutil.copy2(self.run_dir / name, writing / name)
        return f"{stage}-{number}"

    def _save(self, **extra: Any) -> None:
        if not is_main():
            return
        stored = {
            "stages": self.stages,
            "config": self.config,
            "facts": self.facts,
            "seed": self.config.get("seed"),
            "versions": versions(),
            "updated_at": _now(),
            "calls": self.calls,
            **({"moving": self.moving} if self.moving else {}),
            **extra,
        }
        write_atomically(
            self.run_dir / FILE_NAME, json.dumps(redacted_tree(stored), indent=2, ensure_ascii=False) + "\n"
        )


def _is_record(stored: Any) -> bool:
    """Whether JSON has the shape that `_save` writes, as far as it is read again."""
    parts = ("config", "stages", "facts", "moving", "calls")
    if not isinstance(stored, dict) or not all(isinstance(stored.get(part, {}), dict) for part in parts):
        return False
    if not all(stage in OUTPUTS and _is_place_of(stage, name) for stage, name in stored.get("moving", {}).items()):
        return False
    calls = stored.get("calls", {})
    if not all(number.isdecimal() and isinstance(call, dict) for number, call in calls.items()):
        return False
    return all(
        isinstance(stage, dict)
        and stage.get("output", "") in ("", *OUTPUTS.get(name, ()))  # no path to somewhere else
        and isinstance(stage.get(CALLS, []), list)
        and all(isinstance(number, str) and number in calls for number in stage.get(CALLS, []))
        and isinstance(stage.get("metrics", {}), dict)
        and (stage.get("status") != "done" or {"output", "metrics"} <= stage.keys())
        for name, stage in stored.get("stages", {}).items()
    )


def _is_place_of(stage: str, name: Any) -> bool:
    return isinstance(name, str) and name.removeprefix(f"{stage}-").isdecimal() and name.startswith(stage)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
