"""Seeds: a random generator for each purpose of each step, and the states of the global ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def step_seed(seed: int, step: int, purpose: str) -> int:
    """A seed of its own for each step and purpose, so that no generator has to be carried along."""
    digest = 14695981039346656037  # FNV-1a, 64 bit: stable over processes and versions, unlike hash()
    for byte in f"{seed}/{step}/{purpose}".encode():
        digest = (digest ^ byte) * 1099511628211 % 2**64
    return digest % 2**63


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator seeded with `step_seed`."""
    return torch.Generator().manual_seed(step_seed(seed, step, purpose))


def generator_states() -> dict[str, Any]:
    """This process's global generators: of torch (and of its GPU), Python and NumPy."""
    version, words, gauss = random.getstate()
    _, keys, *numpy_rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), *numpy_rest),
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put back what `generator_states` gave."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys, *numpy_rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numpy_rest))


@contextmanager
def generators_apart() -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's generators are another stream than outside.

    It follows from a single draw of Python's generator, so that it is another one each time, and the same after a
    resumption. However much is drawn inside, and whatever seed is set there, what is drawn outside stays the same.
    """
    seed = random.getrandbits(63)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
