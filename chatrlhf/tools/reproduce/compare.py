"""Two runs compared: metric by metric, sample by sample, file by file."""

from __future__ import annotations

import filecmp
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from chatrlhf.errors.boundary import doing
from chatrlhf.runtime.atomic_files import CONTENTS
from chatrlhf.runtime.manifest import OUTPUTS
from chatrlhf.runtime.run_log import METRICS, SAMPLES

TIMINGS = ("time/", "tokens/s")
TOLERANCE = 1e-3  # on other hardware, or with other packages
Verdict = Literal["equal", "within", "differs"]


@dataclass(frozen=True)
class Compared:
    """One thing that both runs have left."""

    what: str
    size: str  # how much was compared
    difference: float  # largest |a - b| / max(|a|, |b|, 1), of weights |a - b| / |a| of a tensor; inf: not comparable
    where: str = ""  # it is

    def verdict(self, tolerance: float) -> Verdict:
        """How it came out, where so much is allowed."""
        if self.difference == 0:
            return "equal"
        return "within" if self.difference <= tolerance else "differs"


def compare_runs(first: Path, second: Path, stages: Sequence[str]) -> Iterator[Compared]:
    """All that finished stages have left: each metric at each step, samples, and the files of their results."""
    for stage in stages:
        yield from _metrics(first, second, stage)
        yield from _samples(first, second, stage)
        for output in OUTPUTS[stage]:
            yield from _files(first, second, output)


def _metrics(first: Path, second: Path, stage: str) -> Iterator[Compared]:
    values = [_by_metric(folder, stage) for folder in (first, second)]
    for name in sorted(values[0].keys() | values[1].keys()):
        one, other = (each.get(name, {}) for each in values)
        apart = {step: _apart(one.get(step), other.get(step)) for step in sorted(one.keys() | other.keys())}
        yield _worst(f"{stage} {name}", f"{len(apart)} steps", {f"step {step}": d for step, d in apart.items()})


def _by_metric(run_dir: Path, stage: str) -> dict[str, dict[int, float]]:
    """Values by metric and step, without what tells how long something took."""
    found: dict[str, dict[int, float]] = {}
    for record in _rows(run_dir / METRICS, stage):
        for name, value in record.items():
            if name not in ("stage", "step") and not name.startswith(TIMINGS):
                found.setdefault(name, {})[record["step"]] = value
    return found


def _samples(first: Path, second: Path, stage: str) -> Iterator[Compared]:
    one, other = (_rows(folder / SAMPLES, stage) for folder in (first, second))
    if not one and not other:
        return
    apart = {f"row {i + 1}": _apart(a, b) for i, (a, b) in enumerate(zip(one, other, strict=False))}
    if len(one) != len(other):
        apart["the number of rows"] = math.inf
    yield _worst(f"{stage} samples", f"{len(one)} rows", apart)


def _rows(path: Path, stage: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    with doing("reading", path, untrusted=True):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [record for record in records if record["stage"] == stage]


def _files(first: Path, second: Path, output: str) -> Iterator[Compared]:
    names = [
        {path.relative_to(run / output) for path in (run / output).rglob("*") if path.is_file()}
        for run in (first, second)
    ]
    for name in sorted((names[0] | names[1]) - {Path(CONTENTS)}):
        paths = [run / output / name for run in (first, second)]
        what = f"{output}/{name}"
        missing = [path for path in paths if not path.is_file()]
        if missing:
            yield Compared(what, "a file", math.inf, f"only one run has it, not {missing[0].parents[len(name.parts)]}")
            continue
        size = f"{paths[0].stat().st_size:,} bytes"
        if filecmp.cmp(*paths, shallow=False):
            yield Compared(what, size, 0.0)
        else:
            yield _worst(what, size, _apart_inside(*paths, first, second))


def _apart_inside(one: Path, other: Path, first: Path, second: Path) -> dict[str, float]:
    """How far two files are apart, by tensor, or by place in a JSON file."""
    if one.suffix == ".safetensors":
        return _tensors(one, other)
    try:
        # A file may name the folder of its run.
        texts = [
            path.read_text(encoding="utf-8").replace(str(run.absolute()), "RUN")
            for path, run in ((one, first), (other, second))
        ]
        if texts[0] == texts[1]:
            return {}
        return _leaves(*(json.loads(text) for text in texts), "")
    except ValueError:  # neither text nor JSON
        return {"its bytes": math.inf}


def _tensors(one: Path, other: Path) -> dict[str, float]:
    """Of each tensor the norm of the difference over its own."""
    from safetensors import safe_open

    with safe_open(one, "pt") as first, safe_open(other, "pt") as second:
        names = set(first.keys()), set(second.keys())
        apart = {name: math.inf for name in names[0] ^ names[1]}
        for name in sorted(names[0] & names[1]):
            a, b = first.get_tensor(name), second.get_tensor(name)
            if a.shape != b.shape or a.dtype != b.dtype:
                apart[name] = math.inf
            elif not a.equal(b):
                a, b = a.double(), b.double()
                share = float((a - b).norm() / a.norm().clamp(min=1e-30))
                apart[name] = share if math.isfinite(share) else math.inf
        return apart


def _leaves(one: Any, other: Any, place: str) -> dict[str, float]:
    """Where two JSON values are apart."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        pairs = ((f"{place}.{key}".lstrip("."), one.get(key), other.get(key)) for key in keys)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = ((f"{place}[{i}]", a, b) for i, (a, b) in enumerate(zip(one, other, strict=True)))
    else:
        return {place or "its content": _apart(one, other)}
    return {name: value for key, a, b in pairs for name, value in _leaves(a, b, key).items()}


def _apart(one: Any, other: Any) -> float:
    """|a - b| / max(|a|, |b|, 1) of numbers, the largest of what is inside; inf for what is another thing."""
    if one == other:
        return 0.0
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return max(_apart(one[key], other[key]) for key in one)
    if not all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (one, other)):
        return math.inf
    if math.isnan(one) and math.isnan(other):
        return 0.0
    apart = abs(one - other) / max(abs(one), abs(other), 1.0)
    return apart if math.isfinite(apart) else math.inf


def _worst(what: str, size: str, apart: dict[str, float]) -> Compared:
    where = max(apart, key=lambda place: apart[place], default="")
    difference = apart.get(where, 0.0)
    return Compared(what, size, difference, where if difference else "")
