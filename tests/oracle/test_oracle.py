"""All that a run computes is what plain transformers computes from the folders that it left, within 1e-5 in float32.

`python tests/oracle/compare.py` prints the table.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from compare import QUANTITIES, Oracle, differences
from product_run import CASES, Case
from recompute import Blocker

TOLERANCE = 1e-5
CANARIES = ("LLaMA", "Flan-T5/LoRA")
# Their linear layers, which adapters are added to, are arranged as another family's.
LIKE_OTHERS = ("OPT", "Galactica", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma 3", "StableLM")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def oracle() -> Iterator[Oracle]:
    made = Oracle()
    yield made
    assert made.close() == 0


@pytest.fixture(autouse=True)
def frozen_imports() -> Iterator[None]:
    """Trainers call `gc.collect` several times a run; without this it walks every imported object each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def marked(case: Case) -> object:
    marks = [] if case.name in CANARIES else [pytest.mark.slow]
    if case.lora and case.family in LIKE_OTHERS:
        marks.append(pytest.mark.nightly)
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [marked(case) for case in CASES])
def test_a_run_is_recomputed_from_what_it_left(case, oracle, tmp_path):
    found = differences(case, tmp_path, oracle)
    assert set(found) == set(QUANTITIES) and max(found.values()) <= TOLERANCE, found


def test_the_oracle_cannot_import_what_it_checks():
    for name in ("chatrlhf", "chatrlhf.models"):
        with pytest.raises(ImportError, match="without chatrlhf"):
            Blocker().find_spec(name)
    assert Blocker().find_spec("transformers") is None
