"""A session of checks over a small configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import settings, write_files

from chatrlhf import load_config
from chatrlhf.tools.check.session import Session
from chatrlhf.tools.check.start import check_inputs


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_files(folder)
    return folder


@pytest.fixture
def session(data, tmp_path, one_thread) -> Callable[..., Session]:
    """Makes one whose rows are read; changes are dotted keys."""

    def make(stages: str, deep: bool = False, **changes) -> Session:
        keys = {name.replace("__", "."): value for name, value in changes.items()}
        config = load_config(settings(data), {"output_dir": str(tmp_path / "run")} | keys)
        made = Session(config, stages.split(), tmp_path / "scratch", deep)
        list(check_inputs(made))
        return made

    return make
