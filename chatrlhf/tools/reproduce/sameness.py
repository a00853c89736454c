"""Whether a run would be made again from the same: data, weights, tokenizers, templates; code, packages, hardware."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from chatrlhf.config.on_resume import settings_of
from chatrlhf.data.inputs import read_inputs
from chatrlhf.errors import UserError, one_line
from chatrlhf.errors.redaction import redacted_tree
from chatrlhf.pipeline import reward_function
from chatrlhf.runtime.provenance import code, hardware, versions
from chatrlhf.stages.resume import DATA
from chatrlhf.stages.sources import Sources
from chatrlhf.tools.reproduce.record import Record, Rerun

# Of the hardware, what bits depend on; the system's release is only told.
COMPUTES = ("gpu", "cuda", "cpu", "cpu_capability", "threads", "processes")


def content_differences(record: Record, note: Callable[[str], None]) -> list[str]:
    """What a stage was made from and is another now; a run from it would be another run.

    Args:
        note: is told where there is much to hash.
    """
    return list(dict.fromkeys(line for rerun in record.reruns for line in _of_stage(record, rerun, note)))


def environment_differences(call: dict[str, Any], threads: int | None) -> list[str]:
    """What computes, and is another than that of a recorded call.

    Args:
        threads: `num_threads` of the configuration.
    """
    lines = [] if call["code"]["sha256"] == code()["sha256"] else [f"code: {_shown(call['code'])} -> {_shown(code())}"]
    lines += _changes("", call["versions"], versions())
    then, now = ({name: each.get(name) for name in COMPUTES} for each in (call["hardware"], hardware(threads)))
    return lines + _changes("hardware, ", then, now)


def setting_differences(rerun: Rerun, recorded: dict[str, Any]) -> list[str]:
    """Settings that a stage had and would not have now: by --set, or because a default is another.

    Args:
        recorded: of the manifest, the stage's.
    """
    now = redacted_tree(settings_of(rerun.stage, rerun.config.model_dump(mode="json")))  # as the manifest has them
    then = recorded.get("settings", now)
    changed = [key for key in now if key in then and then[key] != now[key]]
    return [f"{key}: {then[key]!r} -> {now[key]!r}" for key in changed]


def _of_stage(record: Record, rerun: Rerun, note: Callable[[str], None]) -> Iterator[str]:
    then = record.manifest.stages[rerun.stage].get("made_from", {})
    # Where data are by --set, and results of stages before in the run's own folder, as they were.
    config = rerun.config.model_copy(update={"output_dir": rerun.recorded.output_dir})
    try:
        with rerun.in_its_folder():
            reward = reward_function(config, None, [rerun.stage])
            inputs = read_inputs(config, [rerun.stage], needs_judgements=reward is None)
            config.fix_day(record.day or config.day)
            now = Sources(config, record.manifest, inputs, reward, note).made_from(rerun.stage)
    except UserError as error:
        yield f"{rerun.stage}: {one_line(error, limit=1000)}"
        return
    for path, file_hash in _other_files(then.get(DATA, {}), now.get(DATA, {})):
        yield f"{rerun.stage} data: {path} {'is not the file it was' if file_hash else 'was not read'}"
    for key, value in then.items():
        if key == DATA or now.get(key, [None, None])[1] == value[1]:
            continue
        yield (
            f"{rerun.stage}, {key}: {value[0]} has another content than it had"
            if key in now
            else (f"{rerun.stage}, {key}: {value[0]} is not read any more")
        )


def _other_files(then: dict[str, str], now: dict[str, str]) -> list[tuple[str, str]]:
    """Files with a content that was not read before, or those that are gone; they are compared by their order."""
    if list(then.values()) == list(now.values()):
        return []
    changed = [(path, digest) for path, digest in now.items() if digest not in then.values()]
    return changed or [(path, "") for path, digest in then.items() if digest not in now.values()] or list(now.items())


def _changes(kind: str, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [f"{kind}{name}: {then.get(name) or 'none'} -> {now.get(name) or 'none'}" for name in names]


def _shown(code: dict[str, str | None]) -> str:
    commit = "" if code["commit"] is None else f"commit {code['commit'][:12]}, "
    return f"{commit}sources {str(code['sha256'])[:12]}"
