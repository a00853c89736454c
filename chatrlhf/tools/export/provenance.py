"""Where an exported model comes from: the run that trained it, and what was done with its weights since.

Written beside the weights, so that a model card can say it when the run's folder is long gone. Of the user's machine it
holds the names of files and their hashes, no folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chatrlhf import __version__
from chatrlhf.runtime.atomic_files import write_atomically
from chatrlhf.runtime.manifest import FILE_NAME as MANIFEST
from chatrlhf.runtime.manifest import OUTPUTS

ORIGIN = "origin.json"
# Of a stage's settings, those that say how it was trained; a section's others may hold addresses.
TOLD = {
    "lr", "epochs", "batch_size", "max_sequence_length", "template", "loss_on", "loss", "peft_enable", "load_in_4bit",
    "load_in_8bit", "rope_scaling", "label_smoothing_factor", "algorithm", "total_episodes", "num_rollouts",
    "ppo_epochs", "actor_lr", "critic_lr", "init_kl_coef", "target", "steps",
}  # fmt: skip
SECTIONS = {
    "PRETRAIN": "pretrain_config",
    "ACTOR": "actor_config",
    "REWARD": "reward_config",
    "RL": "trainer_config",
}


def origin_of(folder: Path) -> dict[str, Any]:
    """What is known of a model: ``run``, of the stages that led to it, and ``steps``, done since; empty without a run.

    An export says it itself, a result of a run is found in the manifest beside it.
    """
    if (folder / ORIGIN).exists():
        return json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    folder = folder.resolve()
    manifest = folder.parent / MANIFEST
    of_stage = [stage for stage, outputs in OUTPUTS.items() if folder.name in outputs]
    if not of_stage or not manifest.exists():
        return {"run": {}, "steps": []}
    stored = json.loads(manifest.read_text(encoding="utf-8"))
    order = list(OUTPUTS)
    led_here = [
        stage
        for stage in order[: order.index(of_stage[0]) + 1]
        if stored["stages"].get(stage, {}).get("status") == "done"
    ]
    stages = {stage: _stage(stage, stored["stages"][stage], stored["config"]) for stage in led_here}
    return {"run": {"stages": stages, "seed": stored["seed"], "versions": stored["versions"]}, "steps": []}


def write_origin(folder: Path, source: Path, what: str, **figures: Any) -> None:
    """Write down what was done with the weights of ``source``, behind all that is known of them."""
    known = origin_of(source)
    step = {"what": what, "of": source.resolve().name, "by": f"chatrlhf {__version__}", **figures}
    text = json.dumps({"run": known["run"], "steps": [*known["steps"], step]}, indent=2, ensure_ascii=False)
    write_atomically(folder / ORIGIN, text + "\n")


def public_name(model: str | None) -> str | None:
    """A model's name as others know it: of one that lies here, its folder's."""
    if model is None or (model.count("/") <= 1 and not model.startswith((".", "~", "/")) and not Path(model).exists()):
        return model
    return Path(model).name


def _stage(stage: str, record: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    name = SECTIONS.get(stage, "")
    # Those that it was trained by; a later stage's run may have had others.
    own = {key.removeprefix(f"{name}."): value for key, value in record.get("settings", {}).items()}
    section = config.get(name, {}) | own
    told = {key: value for key, value in section.items() if key in TOLD and value not in (None, False)}
    datasets = [entry["name"] for entry in section.get("datasets") or []]
    return {
        "model": public_name(record.get("model")),
        "datasets": [Path(name).name if Path(name).suffix else name for name in datasets],
        "files": {Path(path).name: digest for path, digest in (record.get("inputs") or {}).items()},
        "rows": record.get("rows"),
        "settings": told,
        "metrics": record.get("metrics") or {},
        "finished_at": record.get("finished_at"),
    }
