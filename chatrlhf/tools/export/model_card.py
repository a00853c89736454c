"""A model card that says what a run wrote down about itself, and nothing else."""

from __future__ import annotations

import json
from typing import Any

from chatrlhf.data.sources.catalogue import SOURCES

STAGES = {
    "PRETRAIN": "language modeling on long text",
    "ACTOR": "supervised fine-tuning",
    "REWARD": "reward model",
    "RL": "reinforcement learning",
}


def model_card(repo: str, origin: dict[str, Any], adapters: bool) -> str:
    """The text of `README.md`.

    Args:
        origin: from `origin_of`.
        adapters: whether the weights are adapters, which peft loads.
    """
    stages: dict[str, dict[str, Any]] = origin["run"].get("stages", {})
    lines = ["---", *_metadata(stages, adapters), "---", "", f"# {repo.rpartition('/')[2]}", ""]
    if stages:
        lines += ["Trained by chatrlhf. What follows is what the run wrote into its manifest.", ""]
    else:
        lines += ["No manifest of a run lay beside these weights, so how they were trained is not known here.", ""]
    for stage, record in stages.items():
        lines += [f"## {stage}: {STAGES.get(stage, stage)}", "", *_stage(record), ""]
    if origin["steps"]:
        lines += ["## Done with the weights since", ""]
        for step in origin["steps"]:
            figures = {key: value for key, value in step.items() if key not in ("what", "of", "by")}
            lines.append(f"- {step['what']} ({step['by']})" + (f": {_listed(figures)}" if figures else ""))
        lines.append("")
    if versions := origin["run"].get("versions"):
        lines += ["## Versions", "", _listed({name: version for name, version in versions.items() if version}), ""]
    lines += [
        "## What this card does not say",
        "",
        "Licence, intended use, and how the model does on anything but the figures above: no one wrote that down yet.",
        "The licences of the base model and of the data apply.",
    ]
    return "\n".join(lines) + "\n"


def _metadata(stages: dict[str, dict[str, Any]], adapters: bool) -> list[str]:
    base = next((record["model"] for record in stages.values() if "/" in (record["model"] or "")), None)
    named = [name for record in stages.values() for name in record["datasets"]]
    public = [SOURCES[key].hub_name for name in named if (key := name.upper().replace("-", "_")) in SOURCES]
    lines = [f"library_name: {'peft' if adapters else 'transformers'}", "pipeline_tag: text-generation"]
    if base:
        lines.append(f"base_model: {base}")
    if public:
        lines += ["datasets:", *(f"- {name}" for name in dict.fromkeys(public))]
    return [*lines, "tags:", "- chatrlhf", *(["- rlhf"] if "RL" in stages else [])]


def _stage(record: dict[str, Any]) -> list[str]:
    lines = [f"- started from: {record['model']}", f"- finished: {record['finished_at']}"]
    for name, digest in record["files"].items():
        lines.append(f"- data: {name} (SHA-256 {digest[:12]}...)")
    if record["datasets"]:
        lines.append(f"- datasets: {', '.join(record['datasets'])}")
    if record["rows"]:
        lines.append(f"- rows: {_listed(record['rows'])}")
    if record["settings"]:
        lines.append(f"- settings: {_listed(record['settings'])}")
    if record["metrics"]:
        lines.append(f"- last metrics: {_listed(record['metrics'])}")
    return lines


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "(" + _listed(value) + ")"
    return (
        json.dumps(value) if isinstance(value, (bool, list)) else f"{value:,}" if isinstance(value, int) else str(value)
    )
