"""Checks of memory, time and room on the disk, from the plan of the run."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from chatrlhf.errors import UserError
from chatrlhf.runtime.check_result import CheckResult, failed, judged
from chatrlhf.runtime.disk_space import check_room
from chatrlhf.tools.check.session import Session
from chatrlhf.tools.plan.hardware import GB
from chatrlhf.tools.plan.report import duration
from chatrlhf.tools.plan.run_plan import plan_run

TIGHT = 0.9  # share of a device's memory


def check_plan(session: Session) -> Iterator[CheckResult]:
    """Each stage fits into the memory of this machine; and how long it will take."""
    plan = plan_run(session.config, session.stages)
    room = plan.hardware.device.memory
    for stage in plan.stages:
        need = stage.most.total
        takes = "time is not known" if stage.seconds is None else f"takes about {duration(stage.seconds)}"
        yield judged(
            f"{stage.name} memory and time",
            f"needs {need / GB:.1f} of {room / GB:.1f} GB on {plan.hardware.name}, in {stage.most.name}; {takes}",
            "lower micro_batch_size or max_sequence_length, set peft_enable, or plan for other hardware (--dry-run)",
            warn=need > TIGHT * room,
            fail=need > room,
        )


def check_disk(session: Session, stage: str, model: nn.Module, keep: int) -> CheckResult:
    """A stage's checkpoints and its result have room.

    Args:
        model: what the stage trains.
        keep: how many checkpoints are kept.
    """
    name = f"{stage} room on the disk"
    folder = next(
        each
        for each in (session.config.run_dir.absolute(), *session.config.run_dir.absolute().parents)
        if each.is_dir()
    )
    warnings: list[str] = []
    try:
        check_room(folder, stage, model, keep, False, warnings.append)
    except UserError as error:
        return failed(name, error)
    if warnings:
        measured, _, remedy = warnings[0].partition("; ")
        return CheckResult(name, "warn", measured, remedy)
    return CheckResult(name, "pass", f"{keep} checkpoints and the trained model have room in {folder}")
