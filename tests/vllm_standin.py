"""`installed()`: inside, `import vllm` finds the stand-in of `standins/`, and TRL's code runs on it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import trl.generation.vllm_client
import trl.generation.vllm_generation

STANDINS = str(Path(__file__).parent / "standins")


@contextmanager
def installed() -> Iterator[None]:
    assert importlib.util.find_spec("vllm") is None, "these tests are for machines without vLLM"
    sys.path.insert(0, STANDINS)
    _look_again()
    try:
        yield
    finally:
        sys.path.remove(STANDINS)
        for name in [name for name in sys.modules if name.split(".")[0] in ("vllm", "vllm_server")]:
            del sys.modules[name]
        _look_again()


def _look_again() -> None:
    """TRL looks for vLLM while its modules are imported."""
    importlib.invalidate_caches()
    importlib.reload(trl.generation.vllm_client)
    importlib.reload(trl.generation.vllm_generation)
