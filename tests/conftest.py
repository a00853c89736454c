"""What every test shares: no network, one thread, quiet libraries."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tests import the helpers beside this file: twin, tiny

import pytest  # noqa: E402
import torch  # noqa: E402

# Files of long tests, which workers are to begin with, so that none is left with one at the end.
LONG = (
    "test_resume_keys.py",
    "test_default_run.py",
    "test_random_walks.py",
    "test_exact_optimum.py",
    "test_sharded_stages.py",
    "test_resume.py",
    "test_distributed.py",
    "test_engines.py",
    "test_families.py",
    "test_every_family.py",
    "test_mixture_run.py",
    "test_init.py",
)


# Folders of whole runs: their tests are slow, but for the few that are marked quick.
RUNS = ("end_to_end", "oracle", "recipes")


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in RUNS and item.get_closest_marker("quick") is None:
            item.add_marker("slow")
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _same_random_numbers_for_every_test():
    torch.manual_seed(0)


@pytest.fixture
def signals_arrive():
    """A shell's background jobs, and what they start, ignore some signals."""
    from chatrlhf.runtime.signals import NUMBERS

    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_thread():
    """For models too small for more; and sums in one order keep their runs repeatable."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
