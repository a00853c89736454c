"""What a manifest says of how to repeat a run: each stage with the settings of the call that trained it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

from chatrlhf.config import load_config
from chatrlhf.config.on_resume import OnResume, rules, settings_of
from chatrlhf.config.schema import STAGES, Config
from chatrlhf.errors import CheckpointError
from chatrlhf.errors.redaction import HIDDEN
from chatrlhf.runtime.manifest import CALLS, FILE_NAME, Manifest

DAY = "day"  # a fact of the manifest, see `pipeline.py`


@dataclass(frozen=True)
class Rerun:
    """A stage that is to be trained again."""

    stage: str
    config: Config  # whose folder is the new one
    recorded: Config  # whose folder is the run's
    number: str  # in the manifest, of the last call that trained the stage
    call: dict[str, Any]

    @contextmanager
    def in_its_folder(self) -> Iterator[None]:
        """In the working directory it had, where that is there: files and functions may be looked for in it."""
        before, folder = os.getcwd(), Path(self.call["working_directory"])
        if folder.is_dir():
            os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)


@dataclass(frozen=True)
class Launch:
    """A run that is to be started in the new folder."""

    rerun: Rerun  # whose settings it has
    type: str
    resume: bool


@dataclass(frozen=True)
class Record:
    """What a run's folder says of the run."""

    manifest: Manifest
    reruns: list[Rerun]
    notes: list[str]  # what is left out, or cannot be equal

    @property
    def day(self) -> date | None:
        """The date that templates have shown."""
        day = self.manifest.facts.get(DAY)
        return None if day is None else date.fromisoformat(day)

    @property
    def launches(self) -> list[Launch]:
        """The runs that repeat the calls, in their order.

        A stage by itself comes out as it does among others, but for RL: it also reads the demonstrations of an ACTOR
        stage that it was asked for with. So a call of several stages is repeated as one where RL was left by it, and
        what an earlier call has left is kept as --resume keeps it.
        """
        launches: list[Launch] = []
        by_call = groupby(sorted(self.reruns, key=lambda rerun: int(rerun.number)), key=lambda rerun: rerun.number)
        for group in (list(reruns) for _, reruns in by_call):
            last = group[-1]
            if last.stage == "RL" and len(last.call["asked"]) > 1:
                launches.append(Launch(last, "ALL", resume=bool(launches)))
            else:
                launches += [Launch(rerun, rerun.stage, resume=False) for rerun in group]
        return launches

    @property
    def call(self) -> dict[str, Any]:
        """The newest call."""
        return self.reruns[-1].call


def read_record(run_dir: Path, into: Path, overrides: Sequence[str] = ()) -> Record:
    """How to repeat the finished stages of a run.

    Args:
        into: the new run's folder.
        overrides: words such as ``section.key=value``, laid over each stage's settings.

    Raises:
        CheckpointError: there is no run, or what it has done cannot be repeated; it says why.
    """
    if not (run_dir / FILE_NAME).exists():
        raise CheckpointError(f"{run_dir}: no run is here ({FILE_NAME} is missing); name the output_dir of a run")
    manifest = Manifest.open(run_dir, resume=True)
    done = [stage for stage in STAGES if manifest.is_done(stage)]
    if not done:
        raise CheckpointError(f"{run_dir}: no stage is finished, so there is nothing to compare with; finish it first")
    reruns = [_rerun(manifest, stage, into, overrides) for stage in done]
    notes = [
        f"{stage} is not finished and is left out" for stage in STAGES if stage in manifest.stages.keys() - {*done}
    ]
    if any(rerun.stage == "RL" and rerun.config.trainer_config.rollout_backend == "vllm" for rerun in reruns):
        notes.append("vLLM samples with random numbers of its own, so RL cannot come out equal")
    return Record(manifest, reruns, notes)


def _rerun(manifest: Manifest, stage: str, into: Path, overrides: Sequence[str]) -> Rerun:
    numbers = manifest.stages[stage].get(CALLS, [])
    calls = [manifest.calls[number] for number in numbers]
    if not calls:
        raise CheckpointError(
            f"{manifest.run_dir}: {stage} was trained by a version that did not record its calls; train it again to "
            "have a run that can be reproduced"
        )
    if (given := calls[-1].get("reward_given")) is not None and stage == "RL":
        raise CheckpointError(
            f"{manifest.run_dir}: the reward function {given} of RL was given in Python, which a manifest cannot keep; "
            "name it in reward_config.reward_fn, or repeat the run in Python"
        )
    recorded = [_config_of(call, manifest.run_dir, ()) for call in calls]
    if changed := _changed(stage, recorded):
        raise CheckpointError(
            f"{manifest.run_dir}: {stage} was continued by --resume with other settings ({', '.join(changed)}), which "
            "one run cannot repeat; reproduce runs that were resumed unchanged"
        )
    config = _config_of(calls[-1], into, overrides)
    if hidden := [key for key, value in settings_of(stage, config.model_dump(mode="json")).items() if _hides(value)]:
        raise CheckpointError(
            f"{manifest.run_dir}: credentials in {', '.join(hidden)} are not kept in a manifest; give the whole value "
            f"by --set {hidden[0]}=..."
        )
    return Rerun(stage, config, recorded[-1], numbers[-1], calls[-1])


def _config_of(call: dict[str, Any], run_dir: Path, overrides: Sequence[str]) -> Config:
    folder = call.get("config_folder")
    keys = {"output_dir": str(run_dir), "trackers": []}
    config = load_config(call["config"], keys, base_dir=None if folder is None else Path(folder))
    return load_config(config, overrides) if overrides else config


def _hides(value: Any) -> bool:
    """Whether credentials in a URL were left out when the value was written."""
    return isinstance(value, str) and ":/" in value and (f"{HIDDEN}@" in value or f"={HIDDEN}" in value)


def _changed(stage: str, configs: list[Config]) -> list[str]:
    """Keys that a stage reads and that differ between the calls that trained it; files are compared by content."""
    first, *others = (settings_of(stage, config.model_dump(mode="json")) for config in configs)
    kinds = rules()
    changed = {key for other in others for key, value in other.items() if value != first[key]}
    return sorted(key for key in changed if kinds[key].on_resume is not OnResume.BY_CONTENT)
