"""DeepSpeed's JSON beside the YAML: where it lies, and where the two say different things."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatrlhf.config.load import resolve_path
from chatrlhf.config.schema import Config
from chatrlhf.config.strict_json import load_settings
from chatrlhf.errors import ConfigError

DEFAULT_NAME = "ds_config.json"
AUTO = "auto"
EPS = 1e-8  # Adam's, which the YAML has no key for

# What the YAML knows as well: where the JSON leaves it out, it is not DeepSpeed's own default but the YAML's value.
FROM_YAML = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")

SECTIONS = ("bf16", "fp16", "optimizer", "scheduler")  # objects, the last two with an object "params"

# DeepSpeed's schedules and those of the YAML that they are.
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}


@dataclass(frozen=True)
class Known:
    """A number that both files may hold."""

    key: str  # in the JSON, dotted
    value: Any
    of: str | None  # the YAML's key or keys that give it; None: it has none, and the value is this package's


@dataclass(frozen=True)
class Optimization:
    """What the YAML says about an optimizer step of one stage."""

    section: str
    batch_size: int
    micro: int  # rows of a backward of one process
    accumulated: int | None  # backwards of an optimizer step; None: their number varies from step to step
    lr_key: str
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float | None
    lr_scheduler: str
    warmup_steps: int
    precision: str  # fp32, bf16 or fp16

    def known(self) -> list[Known]:
        """Everything that the JSON may repeat."""
        of = f"{self.section}.{{}}".format
        known = [
            Known("train_batch_size", self.batch_size, of("batch_size")),
            Known("train_micro_batch_size_per_gpu", self.micro, of("micro_batch_size")),
            Known("gradient_clipping", self.max_grad_norm or 0.0, of("max_grad_norm")),
            Known("optimizer.params.lr", self.lr, of(self.lr_key)),
            Known("optimizer.params.betas", list(self.betas), of("betas")),
            Known("optimizer.params.weight_decay", self.weight_decay, of("weight_decay")),
            Known("scheduler.params.warmup_max_lr", self.lr, of(self.lr_key)),
            Known("scheduler.params.warmup_num_steps", self.warmup_steps, of("warmup_steps")),
            Known("bf16.enabled", self.precision == "bf16", of("precision")),
            Known("fp16.enabled", self.precision == "fp16", of("precision")),
            Known("optimizer.params.eps", EPS, None),
        ]
        if self.accumulated is not None:
            keys = f"{of('batch_size')} and {of('micro_batch_size')}"
            known.append(Known("gradient_accumulation_steps", self.accumulated, keys))
        return known


def read_deepspeed_config(config: Config, section: str) -> tuple[dict[str, Any], Path]:
    """The JSON that a section names, and where it lies.

    Where it names none it is the `ds_config.json` beside the YAML file, in the working directory, or of this package.

    Raises:
        ConfigError: the file is missing, or is no JSON object with a "zero_optimization" section.
    """
    key, value = f"{section}.deepspeed_config_path", getattr(config, section).deepspeed_config_path
    if value is not None:
        path = resolve_path(config, key, value)
    else:
        from chatrlhf.runtime.bundled_files import artifacts_root

        places = [each / DEFAULT_NAME for each in (config.base_dir, Path.cwd(), artifacts_root()) if each]
        path = next((each for each in places if each.exists()), places[-1])
    try:
        settings = load_settings(path)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(
            f'{key}: {path} has no "zero_optimization" section; DeepSpeed\'s stages are chosen there: '
            '"zero_optimization": {"stage": 2}'
        )
    _check_shape(settings, f"{key}: {path}")
    if settings["zero_optimization"].get("stage") not in (None, 0, 1, 2, 3):
        raise ConfigError(
            f"{key}: {path} has zero_optimization.stage {settings['zero_optimization']['stage']!r}, expected 0 to 3"
        )
    return settings, path


def _check_shape(settings: dict[str, Any], source: str) -> None:
    """Refuse a stage that is none, and sections that are no objects, which are looked into later."""
    stage = settings["zero_optimization"].get("stage", 0)
    if stage not in (0, 1, 2, 3) or not isinstance(stage, int):
        raise ConfigError(f"{source}: zero_optimization.stage must be 0, 1, 2 or 3, got {json.dumps(stage)}")
    for name in ("bf16", "fp16", "optimizer", "scheduler", "optimizer.params", "scheduler.params"):
        node, last = _node(settings, name)
        if node is not None and not isinstance(node.get(last, {}), dict):
            raise ConfigError(f"{source}: {name} must be an object, got {json.dumps(node[last])[:40]}")


def completed(settings: dict[str, Any], source: str, step: Optimization) -> dict[str, Any]:
    """The JSON with "auto" where it says nothing that the YAML says.

    Raises:
        ConfigError: they contradict each other; all contradictions are named, with both values and keys.
    """
    settings = copy.deepcopy(settings)
    for key in FROM_YAML:
        settings.setdefault(key, AUTO)
    for precision in ("bf16", "fp16"):
        section = settings.setdefault(precision, {})
        section.setdefault("enabled", AUTO)
    problems = [*_numbers(settings, step.known()), *(_schedule if step.accumulated else _of_rl)(settings, step)]
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return settings


def filled(settings: dict[str, Any], step: Optimization) -> dict[str, Any]:
    """The JSON with the YAML's values instead of "auto"."""
    settings = copy.deepcopy(settings)
    for known in step.known():
        node, last = _node(settings, known.key)
        if node is not None and node.get(last) == AUTO:
            node[last] = known.value
    return settings


def _numbers(settings: dict[str, Any], known: Iterable[Known]) -> Iterable[str]:
    for each in known:
        node, last = _node(settings, each.key)
        theirs = AUTO if node is None else node.get(last, AUTO)
        if theirs == AUTO or _equal(theirs, each.value):
            continue
        ours = f"the YAML's {each.of} makes it" if each.of else "the stages have"
        change = f", or change {each.of}" if each.of else ""
        yield f'{each.key} is {json.dumps(theirs)} and {ours} {json.dumps(each.value)}; set it to "auto"{change}'


def _schedule(settings: dict[str, Any], step: Optimization) -> Iterable[str]:
    scheduler = settings.get("scheduler")
    if scheduler is None:
        return
    kind = scheduler.get("type")
    if SCHEDULES.get(kind) != step.lr_scheduler:
        yield (
            f"scheduler.type is {json.dumps(kind)} and {step.section}.lr_scheduler is {step.lr_scheduler!r}; leave "
            f"scheduler out, or set {step.section}.lr_scheduler to {SCHEDULES.get(kind, 'what it is')!r}"
        )
    total = scheduler.get("params", {}).get("total_num_steps", AUTO)
    if total != AUTO:
        yield f'scheduler.params.total_num_steps is {total!r} and follows from rows and epochs; set it to "auto"'


def _of_rl(settings: dict[str, Any], step: Optimization) -> Iterable[str]:
    if "scheduler" in settings:
        yield f"it has a scheduler section, and {step.section}.lr_scheduler sets RL's schedule; leave scheduler out"
    number = settings["gradient_accumulation_steps"]
    if number != AUTO:
        yield (
            f"gradient_accumulation_steps is {number!r}, and how many backwards a step of RL has depends on the "
            'lengths of the responses; set it to "auto"'
        )


def _node(settings: dict[str, Any], dotted: str) -> tuple[dict[str, Any] | None, str]:
    *parents, last = dotted.split(".")
    node: Any = settings
    for parent in parents:
        node = node.get(parent) if isinstance(node, dict) else None
    return (node if isinstance(node, dict) else None), last


def _equal(theirs: Any, ours: Any) -> bool:
    if isinstance(ours, list):
        return isinstance(theirs, list) and len(theirs) == len(ours) and all(map(_equal, theirs, ours))
    if isinstance(ours, bool) or not isinstance(theirs, (int, float)) or isinstance(theirs, bool):
        return theirs == ours
    return math.isclose(theirs, ours, rel_tol=1e-9)
