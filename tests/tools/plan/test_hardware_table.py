"""docs/hardware.md is what the command prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.hardware_table import ADVICE, TEXT, TOKENS, rows

PAGE = Path(__file__).parents[3] / "docs" / "hardware.md"


def test_every_line_of_chatllamas_is_there():
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(TEXT.format(tokens=TOKENS))
    for advice in ADVICE:
        assert all(f"| {advice.line} | {model} |" in page for model in advice.models)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("advice", [ADVICE[0], ADVICE[3]], ids=lambda advice: advice.gpus)
def test_its_figures_are_those_of_the_plan(advice):
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert all(row in page for row in rows(advice))
