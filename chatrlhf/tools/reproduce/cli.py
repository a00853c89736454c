"""`chatrlhf reproduce RUN`: it is made again beside itself from its manifest, and compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import USER_ERROR
from chatrlhf.errors.redaction import redacted

if TYPE_CHECKING:  # with torch behind it: what is asked for help needs none
    from chatrlhf.tools.reproduce.record import Record

BESIDE = "-reproduced"


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit status: 0 where all is equal, or within the tolerance, and 2 where not."""
    options = _parser().parse_args(words)
    from rich.console import Console

    from chatrlhf.runtime import collectives
    from chatrlhf.runtime.run_log import quiet_libraries
    from chatrlhf.tools.reproduce.compare import TOLERANCE, compare_runs
    from chatrlhf.tools.reproduce.record import read_record
    from chatrlhf.tools.reproduce.report import show, summary
    from chatrlhf.tools.reproduce.sameness import content_differences

    collectives.start()
    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True, quiet=not collectives.is_main())
    run_dir = options.run.absolute()
    into = options.into.absolute() if options.into else run_dir.with_name(f"{run_dir.name}{BESIDE}")
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ConfigError(f"--into: {into} is there already, and nothing is written over it; remove it or name another")
    record = read_record(run_dir, into, options.set)
    stages = [rerun.stage for rerun in record.reruns]

    def say(line: str) -> None:
        console.print(redacted(line), markup=False)

    say(f"{run_dir}: {', '.join(stages)}, as the manifest says")
    for line in record.notes:
        say(f"note: {line}")
    others = content_differences(record, say)
    for line in others:
        say(f"differs: {line}")
    if others:
        say("it would be another run, so it is not made; restore what differs (--set names other places)")
        return USER_ERROR
    same_machine = _told(record, say)
    _run_again(record)
    if not collectives.is_main():
        return 0
    tolerance = options.tolerance if options.tolerance is not None else 0.0 if same_machine else TOLERANCE
    compared = list(compare_runs(run_dir, into, stages))
    show(console, compared, tolerance)
    say(f"{summary(compared, tolerance)}; the reproduction is in {into}")
    return USER_ERROR if any(each.verdict(tolerance) == "differs" for each in compared) else 0


def _told(record: Record, say: Callable[[str], None]) -> bool:
    """Say which settings and what of the machine is another; returns whether all that computes is the same.

    Raises:
        ConfigError: there are more or fewer processes than there were.
    """
    from chatrlhf.runtime.collectives import world_size
    from chatrlhf.tools.reproduce.sameness import environment_differences, setting_differences

    processes = record.call["hardware"]["processes"]
    if processes != world_size():
        raise ConfigError(
            f"the run had {processes} processes, and here are {world_size()}; start as many: torchrun "
            f"--nproc_per_node {processes} -m chatrlhf reproduce RUN"
        )
    _set_threads(record.call)
    lines = []
    for rerun in record.reruns:
        lines += environment_differences(rerun.call, rerun.config.num_threads)
        for line in setting_differences(rerun, record.manifest.stages[rerun.stage]):
            say(f"differs: setting {line}")
    for line in dict.fromkeys(lines):
        say(f"differs: {line}")
    return not lines


def _set_threads(call: dict[str, Any]) -> None:
    """As many as there were: sums are split by them."""
    import torch

    torch.set_num_threads(call["hardware"]["threads"])


def _run_again(record: Record) -> None:
    """Train each stage, by the settings it had and with those beside it that it had."""
    from chatrlhf.pipeline import run

    for launch in record.launches:
        with launch.rerun.in_its_folder():
            run(launch.rerun.config, type=launch.type, resume=launch.resume, day=record.day)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="chatrlhf reproduce", description="Make a run again from its manifest, beside it, and compare the two."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run")
    parser.add_argument("--into", type=Path, metavar="DIR", help=f"the new run's folder (RUN{BESIDE})")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override a key, such as a path of data that have moved",
    )
    parser.add_argument(
        "--tolerance",
        type=_share,
        metavar="X",
        help="largest difference that passes (0 on the same machine and packages, else 0.001)",
    )
    return parser


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 on")
    return value
