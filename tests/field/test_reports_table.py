"""The table of `docs/correctness.md` is that of the tests."""

from __future__ import annotations

from pathlib import Path

from field_reports import table

PAGE = Path(__file__).parent.parent.parent / "docs" / "correctness.md"


def test_the_page_lists_every_report():
    stored = PAGE.read_text(encoding="utf-8")
    assert table() in stored, "run: python tests/field_reports.py, and put the table into docs/correctness.md"
