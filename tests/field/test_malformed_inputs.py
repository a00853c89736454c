"""Malformed inputs end in one line with exit status 2, and nothing of the user's is changed; our own faults do not."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
from field_reports import report
from malformed import all_cases
from malformed_runs import Case, inside, run, sound_folder

from chatrlhf import load_config, pipeline
from chatrlhf.cli import main
from chatrlhf.data import render_limits
from chatrlhf.errors import UserError
from chatrlhf.tools.inspect import validation

# Parts whose loaders answer with too little yet: no traceback, but the file is not named, or it is passed over.
PENDING: tuple[str, ...] = ()
QUICK = 8  # each eighth case by default


@pytest.fixture(scope="module")
def sound():
    with sound_folder() as folder:
        yield folder


@pytest.fixture(autouse=True)
def _impatient(one_thread, monkeypatch):
    monkeypatch.setattr(render_limits, "RENDERING_SECONDS", 0.3)


def failing(cases: list[Case], sound: Path) -> dict[str, str]:
    """What is wrong with the answer, by the names of the cases."""
    found = {}
    for case in cases:
        outcome = run(case, sound)
        wrong = outcome.faults(case)
        if wrong and (case.owner not in PENDING or "traceback" in wrong):
            found[case.name] = f"{', '.join(wrong)}: {outcome.said[-400:]}"
    return found


@report(
    "huggingface/transformers#27923",
    "hiyouga/LlamaFactory#5155",
    "bghira/SimpleTuner#2353",
    fault="damaged files, folders in the way, broken YAML: tracebacks of a dozen libraries",
    expected="one line that names file or key, exit status 2; 300 inputs made from a seed, no traceback",
)
def test_malformed_inputs_are_one_line(sound):
    assert failing(all_cases()[::QUICK], sound) == {}


@pytest.mark.slow
def test_all_malformed_inputs_are_one_line(sound):
    assert len(all_cases()) == 300
    assert failing(all_cases(), sound) == {}


@pytest.mark.parametrize(
    "error",
    [AssertionError("no"), AttributeError("x"), TypeError("y"), IndexError("z"), RuntimeError("shapes 3 and 4")],
)
def test_a_fault_of_ours_keeps_its_traceback_and_asks_for_a_report(sound, error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(pipeline, "read_inputs", fails)
    status, said = answer(sound, "c.yaml")
    assert status == 1
    assert "Traceback (most recent call last)" in said and f"{type(error).__name__}: {error}" in said
    assert "please report it" in said.splitlines()[-1]


def test_a_fault_of_ours_in_another_command(sound, monkeypatch):
    monkeypatch.setattr(validation, "faults_in", lambda *_: [][0])
    status, said = answer(sound, "data", "check", "a.jsonl")
    assert status == 1 and "IndexError" in said and "please report it" in said


def test_the_python_api_raises_a_typed_error(tmp_path, monkeypatch):
    cause = PermissionError(13, "Permission denied", "/data/a.jsonl")

    def fails(*_, **__):
        raise cause

    monkeypatch.setattr(pipeline, "read_inputs", fails)
    config = load_config({"output_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match="Permission denied: /data/a.jsonl") as caught:
        pipeline.run(config, type="ACTOR")
    assert caught.value.__cause__ is cause and caught.value.run_dir == tmp_path / "run"


@pytest.mark.parametrize("words", [("--row", "0"), ("-n", "-1"), ("--context", "0"), ("--row", "9" * 30)])
def test_numbers_that_no_option_takes(sound, words):
    with pytest.raises(SystemExit) as end:
        answer(sound, "data", "show", "a.jsonl", *words)
    assert end.value.code == 2


def answer(folder: Path, *words: str) -> tuple[int, str]:
    said = io.StringIO()
    with inside(folder), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        return main(list(words)), said.getvalue()
