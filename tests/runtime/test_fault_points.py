"""Each named place is reached by the code, once; and nothing happens there unless somebody has asked for it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import chatrlhf
from chatrlhf.runtime import fault_points
from chatrlhf.runtime.atomic_files import publish_folder

PACKAGE = Path(chatrlhf.__file__).parent


def test_every_place_is_in_the_code_once():
    calls = [
        node.args[0].value
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "reached"
    ]
    assert sorted(calls) == sorted(fault_points.PLACES)


def test_an_action_is_called_at_its_place_with_the_facts_until_it_is_ended(tmp_path):
    seen: list[Path] = []
    end = fault_points.at("publish.between_renames", seen.append)
    publish_folder(tmp_path / "actor", lambda folder: None)
    assert seen == [tmp_path / "actor"]
    end()
    publish_folder(tmp_path / "actor", lambda folder: None)
    assert len(seen) == 1


def test_one_call_alone():
    seen: list[int] = []
    end = fault_points.at("rl.step", seen.append, call=2)
    for step in (5, 6, 7):
        fault_points.reached("rl.step", step)
    end()
    assert seen == [6]


def test_a_place_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"expected one of run\.stage, .*got 'rl\.stepp'"):
        fault_points.at("rl.stepp", lambda: None)
