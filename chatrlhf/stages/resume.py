"""What --resume does: which stages are kept, continued or refused, and what becomes of each setting that has changed.

It is decided before any model is loaded, and what is said here holds: `config/on_resume.py` has the rule of each key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatrlhf.config.on_resume import LENGTH, NEEDS_PROGRESS, OF_THE_BASE, OnResume, flat, rules
from chatrlhf.errors import CheckpointError
from chatrlhf.errors.redaction import redacted_tree
from chatrlhf.runtime.manifest import Manifest

# In what a stage is made from. Of the data: file -> hash; all else is key -> [what it names, hash or None].
DATA = "data"
CORPUS = "the tokenizer of 'tiny'"
REMEDY = "set it back, use another output_dir, or start again without --resume"


@dataclass
class Resumption:
    """A run's request to be resumed.

    Args:
        settings: this run's, flat.
        stages: asked for, without those that are skipped.
        made_from: hashes of what a stage is made from, see `stages/sources.py`.
        starts_from: the stages whose results a stage starts from.
        sharded: stages whose states are sharded.
    """

    manifest: Manifest
    settings: dict[str, Any]
    stages: list[str]
    made_from: Callable[[str], dict[str, Any]]
    starts_from: Callable[[str], tuple[str, ...]]
    sharded: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.settings = redacted_tree(self.settings)  # as the manifest has them: a new password changes nothing

    def check(self) -> list[str]:
        """Refuse what cannot be resumed.

        Returns:
            Lines for people: what differs, and whether it takes effect; what of an earlier version is unknown.

        Raises:
            CheckpointError: all that has to be set back, by name.
        """
        refused = [*self._refused_keys(), *(line for stage in self._begun() for line in self._refused(stage))]
        if refused:
            raise CheckpointError(f"--resume: {'; '.join(refused)}; {REMEDY}")
        lines = [f"{key}: {old!r} -> {new!r} {fate}" for key, (old, new), fate in self._differences()]
        lines = ["settings differ from the run that is resumed: " + "; ".join(lines)] if lines else []
        return lines + self._unknown()

    def is_kept(self, stage: str) -> bool:
        """Whether a stage was finished and is not asked for more."""
        return self.manifest.is_done(stage) and not self.is_extended(stage)

    def is_extended(self, stage: str) -> bool:
        """Whether a finished stage is asked for more epochs, steps or episodes than it has had."""
        key = LENGTH[stage]
        return self.manifest.is_done(stage) and self.settings[key] > self._recorded(stage)[key]

    def _begun(self) -> list[str]:
        return [stage for stage in self.stages if self.manifest.has_begun(stage)]

    def _recorded(self, stage: str) -> dict[str, Any]:
        """The settings that a stage was last trained by."""
        of_run = flat(self.manifest.config)
        known = self.manifest.stages.get(stage, {}).get("settings", {})
        return redacted_tree(of_run | {key: value for key, value in known.items() if key in of_run})

    def _changed(self, stage: str) -> dict[str, tuple[Any, Any]]:
        """Keys that a stage reads, with the values that it was trained by and those of now."""
        recorded = self._recorded(stage)
        return {
            key: (recorded[key], self.settings[key])
            for key, rule in rules().items()
            if stage in rule.stages and recorded[key] != self.settings[key]
        }

    # ----- refusals

    def _refused_keys(self) -> Iterator[str]:
        """Each key with its values and the reasons of all stages."""
        reasons: dict[str, list[str]] = {}
        for stage in self._begun():
            for key, (old, new) in self._changed(stage).items():
                if why := self._why_refused(stage, key):
                    reasons.setdefault(f"{key}: {old!r} -> {new!r} cannot change", []).append(why)
        for change, whys in reasons.items():
            yield f"{change}, {', '.join(whys)}"

    def _refused(self, stage: str) -> Iterator[str]:
        """What of a stage cannot be, whatever the keys."""
        yield from self._replaced(stage, self.manifest.stages.get(stage, {}))
        if self.is_extended(stage) and not any((self.manifest.run_dir / "checkpoints" / stage).glob("step-*")):
            yield f"{LENGTH[stage]}: {stage} is finished and has no checkpoint left to train on from"
        if not self.is_kept(stage):
            later = [each for each in self._begun() if stage in self.starts_from(each)]
            if later:
                yield (
                    f"{stage} is to be trained on, and {' and '.join(later)} started from what it had left; run --type "
                    f"{stage} --resume alone, and {later[0]} again without --resume"
                )

    def _why_refused(self, stage: str, key: str) -> str | None:
        rule, record = rules()[key], self.manifest.stages.get(stage, {})
        if rule.on_resume is OnResume.REFUSED:
            return f"{stage} was begun with it"
        if self.is_kept(stage):
            return None
        if rule.on_resume is OnResume.BY_CONTENT and "made_from" not in record:
            return f"{stage} was begun by an earlier version, which kept no hash of what it names"
        if key in NEEDS_PROGRESS and "settings" not in record:
            return f"{stage} was begun by an earlier version, whose checkpoints do not hold how much was seen"
        if stage in self.sharded and key.endswith(".precision"):
            return f"the states of {stage} are sharded in it"
        return None

    def _replaced(self, stage: str, record: Mapping[str, Any]) -> Iterator[str]:
        """What has other content than it had."""
        if "made_from" not in record and "inputs" not in record:
            return
        before, now = record.get("made_from", {DATA: record.get("inputs")}), self.made_from(stage)
        files = _other_files(before[DATA], now[DATA])
        if files:
            yield f"{files} does not hold the data that {stage} was trained on"
        for key in sorted((before.keys() & now.keys()) - {DATA}):
            (_, old), (name, new) = before[key], now[key]
            # A stage that is finished has left its tokenizer; the data of others may change.
            matters = key != CORPUS or not self.is_kept(stage)
            if matters and old != new and None not in (old, new):
                yield f"{key}: the content of {name} is not what {stage} was begun with"

    # ----- lines for people

    def _differences(self) -> Iterator[tuple[str, tuple[Any, Any], str]]:
        """Each changed key, its values, and what becomes of the change."""
        of_run = flat(self.manifest.config)
        changed_of = {stage: self._changed(stage) for stage in self._begun()}
        for key, rule in rules().items():
            begun = [stage for stage in changed_of if stage in rule.stages]
            changed = [values for stage in begun if (values := changed_of[stage].get(key))]
            if not changed and not begun and of_run[key] != self.settings[key]:
                changed = [(of_run[key], self.settings[key])]
            if changed:
                yield key, changed[0], self._fate(key)

    def _fate(self, key: str) -> str:
        rule = rules()[key]
        stages = [each for each in self.stages if each in rule.stages]
        if rule.on_resume is OnResume.NO_EFFECT:
            return "has no effect on training"
        if not stages:
            return f"has no effect on {' and '.join(self.stages)}"
        trained = [stage for stage in stages if not self.is_kept(stage)]
        if not trained:
            return f"has no effect, {' and '.join(stages)} {'is' if len(stages) == 1 else 'are'} finished"
        if rule.on_resume is OnResume.BY_CONTENT and self.manifest.has_begun(trained[0]):
            return "takes effect, the content is the same"
        starts = [each for each in self.starts_from(trained[0]) if self.manifest.is_done(each)]
        if key in OF_THE_BASE and starts:
            return f"has no effect, {trained[0]} starts from what {starts[-1]} left"
        return "takes effect" if trained == stages else f"takes effect in {' and '.join(trained)}"

    def _unknown(self) -> list[str]:
        begun = [stage for stage in self._begun() if not self.is_kept(stage)]
        without = [stage for stage in begun if "made_from" not in self.manifest.stages.get(stage, {})]
        if not without:
            return []
        return [
            f"{' and '.join(without)} began with an earlier version, which kept no hashes: whether model, tokenizer, "
            "template and reward are the same is not known"
        ]


def _other_files(before: Mapping[str, str] | None, now: Mapping[str, str]) -> str:
    """Files whose content was not there before, or else those that are gone, or all where they have changed places.

    They may have been moved: they are told by their order, of training data first, and by their hashes.
    """
    old, new = list((before or {}).values()), list(now.values())
    if old == new:
        return ""
    added = [path for path, digest in now.items() if digest not in old]
    gone = [path for path, digest in (before or {}).items() if digest not in new]
    return ", ".join(added or gone or now)
