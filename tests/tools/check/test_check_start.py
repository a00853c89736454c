"""`chatrlhf check`: folder, configuration and rows; the command, its JSON and its exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console
from small_run import write_config, write_files

from chatrlhf import cli
from chatrlhf.errors import ConfigError
from chatrlhf.runtime.check_result import CheckResult, failed, judged
from chatrlhf.tools.check import run_checks
from chatrlhf.tools.check.report import as_json, show
from chatrlhf.tools.check.start import check_folder, check_keys, check_texts


@pytest.fixture
def config(tmp_path) -> Path:
    write_files(tmp_path)
    return write_config(tmp_path, output_dir=str(tmp_path / "run"))


def by_name(results) -> dict[str, CheckResult]:
    return {result.name: result for result in results}


def test_a_remedy_is_told_where_something_is_wrong():
    assert judged("a", "b", "c") == CheckResult("a", "pass", "b")
    assert judged("a", "b", "c", warn=True) == CheckResult("a", "warn", "b", "c")
    assert judged("a", "b", "c", warn=True, fail=True).status == "fail"
    assert CheckResult("a", "warn", "b", "c").line == "a: b; c"


def test_a_refusal_is_parted_into_what_is_wrong_and_what_to_do():
    assert failed("a", ValueError("key: no; neither; do this")) == CheckResult(
        "a", "fail", "key: no; neither", "do this"
    )
    assert failed("a", ConfigError("no")) == CheckResult("a", "fail", "no")


def test_the_folder_of_a_run_can_be_made(session, tmp_path):
    made = session("ACTOR")
    assert [result.status for result in check_folder(made)] == ["pass"]
    assert not (tmp_path / "run").exists()


def test_what_is_in_the_way_of_the_folder_fails(config, tmp_path, monkeypatch):
    (tmp_path / "run").write_text("a file")
    monkeypatch.setattr(run_checks, "GROUPS", run_checks.GROUPS[:2])
    results = by_name(run_checks.run_checks(str(config), [], "ACTOR", False))
    assert results["output folder"].status == "fail" and "is a file" in results["output folder"].measured
    assert results["ACTOR data"].status == "pass"  # the rest is looked at all the same


def test_keys_pass_and_a_function_that_is_not_there_fails(session, config):
    assert [result.status for result in check_keys(session("ACTOR"))] == ["pass"]
    results = by_name(run_checks.run_checks(str(config), ["trainer_config.eval_fn=no.such:function"], "RL", False))
    assert results["configuration"].status == "fail" and "no.such" in results["configuration"].measured
    assert "RL repeated rows" not in results  # nothing builds on what is refused


def test_rows_are_measured_and_repeated_ones_told(session, data, tmp_path):
    made = session("ACTOR REWARD RL")
    assert {result.status for result in check_texts(made)} == {"pass"}
    rows = json.loads((data / "actor.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps(rows * 2))
    repeated = session("ACTOR", actor_config__train_dataset_path=str(tmp_path / "twice.json"))
    assert by_name(check_texts(repeated))["ACTOR repeated rows"].status == "warn"


def test_a_run_warns_of_what_a_check_finds(session, data, tmp_path):
    rows = json.loads((data / "actor.json").read_text())
    (tmp_path / "twice.json").write_text(json.dumps(rows * 2))
    made = session("ACTOR", actor_config__train_dataset_path=str(tmp_path / "twice.json"))
    before = list(made.inputs.warnings)
    results = list(check_texts(made))
    assert made.inputs.warnings[len(before) :] == [result.line for result in results if result.status == "warn"] != []


def test_a_row_without_its_field_fails_with_its_place(config, tmp_path):
    (tmp_path / "actor.json").write_text(json.dumps([{"user_input": "a"}] * 3))
    results = by_name(run_checks.run_checks(str(config), [], "ACTOR", False))
    assert results["data"].status == "fail" and "actor.json" in results["data"].measured
    assert results["configuration"].status == "pass" and "actor fresh weights" not in results


def test_a_configuration_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "config.yaml").write_text("actor_config: {lr: fast}")
    (result,) = run_checks.run_checks(str(tmp_path / "config.yaml"), [], "ALL", False)
    assert result.name == "configuration" and result.status == "fail" and "lr" in result.measured


def test_the_command_prints_lines_or_one_object_and_writes_nothing(config, tmp_path, capsys, one_thread):
    words = ["check", str(config), "--type", "ACTOR", "--set", "actor_config.validation_fraction=0.2"]
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "pass  ACTOR data: 48 rows to train on, 12 held out" in shown and "0 fail" in shown
    assert "warn  data: " in shown and "-> add rows" in shown  # 60 rows are few
    assert sorted(tmp_path.rglob("*")) == before


def test_results_are_shown_without_credentials(capsys):
    result = CheckResult("a", "fail", "https://me:hunter22@host/", "use https://me:hunter22@host/")
    show(Console(), result)
    assert "hunter22" not in capsys.readouterr().out + json.dumps(as_json([result]))


def test_what_fails_is_the_exit_status(config, capsys):
    assert cli.main(["check", str(config), "--set", "actor_config.model=/no/such/folder", "--json"]) == 2
    stored = json.loads(capsys.readouterr().out)
    assert stored["status"] == "fail"
    assert {"name", "status", "measured", "remedy"} == stored["checks"][0].keys()
    assert [check["name"] for check in stored["checks"] if check["status"] == "fail"] == ["configuration"]
