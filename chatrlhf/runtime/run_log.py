"""What a run tells while it works: progress on the terminal, `metrics.jsonl`, `samples.jsonl`, trackers.

On a terminal a live bar with throughput and time left; elsewhere one plain line now and then.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing
from chatrlhf.errors.redaction import redacted, redacted_tree
from chatrlhf.runtime.atomic_files import PRIVATE, write_atomically
from chatrlhf.runtime.collectives import is_main
from chatrlhf.runtime.signals import output_closed

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
DIGESTS = "logs.json"  # in a checkpoint
MODES = {METRICS: 0o666, SAMPLES: PRIVATE}  # of new files, less the umask: samples are conversations
SECONDS_BETWEEN_LINES = 5.0

# What the live line shows of a step's metrics, where it has them.
SHOWN = {
    "loss/train": "loss {:.3f}",
    "loss/eval": "held-out loss {:.3f}",
    "reward/accuracy": "accuracy {:.3f}",
    "reward/mean": "reward {:.2f}",
    "kl/ref": "kl {:.2f}",
    "response/length": "length {:.1f}",
    "tokens/s": "{:.0f} tokens/s",
}


class _Terminal(Console):
    """Standard output; when whoever read it has gone, the run is asked to stop."""

    def on_broken_pipe(self) -> None:
        output_closed(BrokenPipeError(errno.EPIPE, "standard output is closed"))


class RunLog:
    """One run's log. Every number goes into `metrics.jsonl`; the terminal shows a few. Only rank 0's says anything."""

    def __init__(self, run_dir: Path, trackers: Sequence[str] = (), config: Mapping[str, Any] | None = None) -> None:
        self.run_dir = run_dir
        self.console = _Terminal(highlight=False, soft_wrap=True, quiet=not is_main())
        self.last: dict[str, dict[str, float]] = {}
        self.at_start: dict[str, dict[str, float]] = {}  # before the first step
        self._progress: Progress | None = None
        self._task: Any = None
        self._total, self._every = 0, 1
        self._last_line = 0.0
        self._digests: dict[tuple[str, str], Any] = {}  # by file and stage, of its lines so far
        self._trackers = _start_trackers(trackers, run_dir, config or {}) if is_main() else []

    def note(self, text: str) -> None:
        """A line for the reader, without credentials."""
        try:
            self.console.print(redacted(text), markup=False)
        except OSError as error:  # such as EIO, of a terminal that was closed
            output_closed(error)

    def warn(self, text: str) -> None:
        """A line that begins with "warning"."""
        self.note(f"warning: {text}")

    @contextmanager
    def stage(self, stage: str, total: int, done: int = 0, every: int = 1) -> Iterator[None]:
        """Shows the progress of ``total`` steps of a stage, ``done`` of which an earlier run has made.

        Args:
            every: steps between two plain lines, where stdout is no terminal; lines also keep 5 seconds apart.
        """
        self._total, self._every, self._last_line = total, every, 0.0
        if not self.console.is_terminal:
            self.note(f"{stage}: {total} steps" + (f", {done} of them done" if done else ""))
            yield
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
        )
        with Progress(*columns, console=self.console, transient=False) as progress:
            self._progress = progress
            self._task = progress.add_task(stage, total=total, completed=done, line="")
            try:
                yield
            finally:
                self._progress = None

    def step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step and show the main ones; what is not finite is no metric, and left out."""
        metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
        record = {"stage": stage, "step": step, **{name: _rounded(value) for name, value in metrics.items()}}
        self._append(METRICS, record)
        self.last.setdefault(stage, {}).update(metrics)
        if step == 0:
            self.at_start.setdefault(stage, {}).update(metrics)
        for tracker in self._trackers:
            tracker.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)
        line = "  ".join(form.format(metrics[name]) for name, form in SHOWN.items() if name in metrics)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, line=line)
        elif line and (self._line_is_due(step) or step >= self._total):
            self._last_line = time.monotonic()
            self.note(f"{stage} {step}/{self._total}  {line}")

    def _line_is_due(self, step: int) -> bool:
        return step % self._every == 0 and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES

    def samples(self, stage: str, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record completions with their scores."""
        for row in rows:
            self._append(SAMPLES, {"stage": stage, "step": step, **row})

    def rewind(self, stage: str, step: int) -> None:
        """Forget what a stage recorded beyond ``step``: a resumed run records it again."""
        if not is_main():
            return
        for name in (METRICS, SAMPLES):
            path = self.run_dir / name
            if not path.exists():
                continue
            with doing("reading", path):
                lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _belongs(line, stage, step)]
            if name == METRICS:
                self._remember(stage, kept)
            self._digests[name, stage] = hashlib.sha256()
            for line in kept:
                if json.loads(line)["stage"] == stage:
                    self._digests[name, stage].update(f"{line}\n".encode())
            write_atomically(path, "".join(line + "\n" for line in kept), MODES[name])

    def _remember(self, stage: str, lines: Sequence[str]) -> None:
        """Take up the newest value of each of a stage's metrics, as if this process had recorded them."""
        self.last[stage], self.at_start[stage] = {}, {}
        for record in map(json.loads, lines):
            if record["stage"] == stage:
                metrics = {name: value for name, value in record.items() if name not in ("stage", "step")}
                self.last[stage] |= metrics
                if record["step"] == 0:
                    self.at_start[stage] |= metrics

    def save_digests(self, stage: str, folder: Path) -> None:
        """Write into a checkpoint what a stage has recorded up to now, as hashes."""
        known = {name: self._digest(name, stage).hexdigest() for name in (METRICS, SAMPLES)}
        (folder / DIGESTS).write_text(json.dumps(known) + "\n", encoding="utf-8")

    def compare(self, stage: str, checkpoint: Path) -> None:
        """Warn where a stage's records up to a checkpoint are not those that were written; `rewind` comes before."""
        path = checkpoint / DIGESTS
        if not is_main() or not path.exists():  # of an earlier version
            return
        for name, digest in json.loads(path.read_text(encoding="utf-8")).items():
            if self._digest(name, stage).hexdigest() != digest:
                self.warn(f"{self.run_dir / name}: what it has of {stage} is not what was written; the run continues")

    def _digest(self, name: str, stage: str) -> Any:
        return self._digests.setdefault((name, stage), hashlib.sha256())

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        if not is_main():
            return
        path, line = self.run_dir / name, json.dumps(record, ensure_ascii=False) + "\n"
        self._digest(name, record["stage"]).update(line.encode())
        with doing("writing", path):
            self.run_dir.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8", opener=lambda at, flags: os.open(at, flags, MODES[name])) as file:
                file.write(line)


def quiet_libraries() -> None:
    """Keep the libraries' own progress bars and chatter off the terminal; errors still come through."""
    import datasets
    import torch
    import transformers

    # Where they are installed, these warn while they are imported, about hardware that nothing here asks for.
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    # What transformers would log of tensors that are missing or left over, `models/loading/loading_report.py` asks for.
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in ("trl", "accelerate", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _belongs(line: str, stage: str, step: int) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False  # half a line, left by a kill
    if not isinstance(record, dict):
        return False
    return record.get("stage") != stage or record.get("step", 0) <= step


def _rounded(value: float) -> float:
    """Exact in float64; integers stay integers."""
    return value if isinstance(value, int) else float(value)


def _start_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any]) -> list[Any]:
    """accelerate's trackers by name; none is started that was not named."""
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    trackers = []
    for name in names:
        kind = LOGGER_TYPE_TO_CLASS.get(name)
        if kind is None:
            raise ConfigError(f"trackers: {name!r} is not one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
        try:
            arguments = {"logging_dir": str(run_dir / "trackers")} if kind.requires_logging_directory else {}
            tracker = kind("chatrlhf", **arguments)
            if hasattr(tracker, "start"):
                tracker.start()
        except ImportError as error:
            raise ConfigError(f"trackers: {name!r} needs a package that is not installed ({error})") from None
        tracker.store_init_configuration(_flat(redacted_tree(config)))
        trackers.append(tracker)
    return trackers


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat
