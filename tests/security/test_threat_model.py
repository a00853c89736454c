"""SECURITY.md: each of its lines has a test, and each file of tests here has a line."""

from __future__ import annotations

import re
from pathlib import Path

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def test_each_line_has_its_tests():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "what is tried" not in line]
    named = [set(re.findall(r"`(test_\w+\.py)`", row.split("|")[-2])) for row in rows]
    assert len(rows) >= 10 and all(named)
    assert set().union(*named) == {path.name for path in HERE.glob("test_*.py")} - {Path(__file__).name}


def test_figures_are_those_of_the_code():
    from chatrlhf.data import gzip_reader, render_limits
    from chatrlhf.errors import redaction
    from chatrlhf.models.loading import safe_config
    from chatrlhf.rl import http_reward

    text = " ".join((ROOT / "SECURITY.md").read_text(encoding="utf-8").split())
    limits = render_limits
    assert (limits.RENDERING_SECONDS, limits.ROOM, limits.REPEATS, limits.MOST_CHARS) == (10, 2**30, 4, 10**6)
    assert "10 s of computing, 1 GiB of memory, output of 4 times the conversation and a million characters" in text
    assert gzip_reader.MOST_RATIO == 200 and safe_config.MOST_BYTES == 256 * 2**20
    assert "200 times its size" in text and "texts have 256 MiB" in text
    assert (http_reward.BYTES_BESIDE, http_reward.BYTES_A_SCORE, http_reward.USUAL_SECONDS) == (2**20, 2**12, 300)
    assert "1 MiB and 4 KiB a score, 300 s" in text
    assert redaction.SHORTEST == 8 and "from 8 characters on" in text


def test_every_version_is_pinned():
    """What is audited is what is installed."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins) > 50 and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
