"""Checks of what a run reads before its first stage: output folder, rows, settings, template, tokenizers."""

from __future__ import annotations

from collections.abc import Iterator

from chatrlhf.data.inputs import Inputs, Rows, read_inputs
from chatrlhf.preflight import check_rows, check_settings
from chatrlhf.runtime.check_result import CheckResult
from chatrlhf.runtime.output_dir import check_output_dir
from chatrlhf.tools.check.session import Session


def check_folder(session: Session) -> Iterator[CheckResult]:
    """The run's folder can be made and written to."""
    check_output_dir(session.config)
    folder = session.config.run_dir
    yield CheckResult(
        "output folder", "pass", f"{folder} can be written" if folder.is_dir() else f"{folder} can be made"
    )


def check_inputs(session: Session) -> Iterator[CheckResult]:
    """Every row of every file has the fields that its stage needs."""
    inputs = session.inputs = read_inputs(session.config, session.stages, not session.has_function)
    for stage, rows in _rows_of(inputs).items():
        files = ", ".join(rows.files) or "datasets of the hub"
        measured = f"{rows.epochs.size:,} rows to train on, {len(rows.held_out):,} held out ({files})"
        yield CheckResult(f"{stage} data", "pass", measured)
    if inputs.pretrain is not None:
        yield CheckResult("PRETRAIN data", "pass", f"{len(inputs.pretrain.files)} files were read")
    for warning in inputs.warnings:
        place, _, rest = warning.partition(": ")
        yield CheckResult("data", "warn", f"{place}: {rest}", "add rows, or go on if this is a trial")


def check_keys(session: Session) -> Iterator[CheckResult]:
    """What the configuration names is there and goes together; what preflight refuses is refused."""
    check_settings(session.config, session.stages, session.has_function, session.config.run_dir)
    measured = f"models, functions and files that {', '.join(session.stages)} name are there and go together"
    yield CheckResult("configuration", "pass", measured)


def check_texts(session: Session) -> Iterator[CheckResult]:
    """Rows against each other, the context, the template and the tokenizers: what each run looks at, too."""
    yield from check_rows(session.config, session.stages, session.inputs)


def _rows_of(inputs: Inputs) -> dict[str, Rows]:
    of_stage = {"ACTOR": inputs.actor, "REWARD": inputs.reward, "RL": inputs.prompts}
    return {stage: rows for stage, rows in of_stage.items() if rows is not None}
