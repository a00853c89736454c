"""A user's files, and the folder of a run that says that its ACTOR stage is finished."""

from __future__ import annotations

from pathlib import Path

import pytest
from reproduce_run import claim
from small_run import settings, write_files

from chatrlhf import load_config


@pytest.fixture
def files(tmp_path) -> Path:
    write_files(tmp_path)
    return tmp_path


@pytest.fixture
def claimed(files) -> Path:
    """By its manifest alone."""
    claim(files / "run", load_config(settings(files), {"output_dir": str(files / "run")}))
    return files / "run"
