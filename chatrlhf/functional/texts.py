"""What texts show of themselves: broken characters, repetition, emptiness; and intervals of a mean change."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

GRAM = 6  # characters; a word and its blank
SHORTEST = 4 * GRAM  # characters of a text whose repetition says anything
NOT_TEXT = {"Cc", "Cn", "Co", "Cs"}  # Unicode's categories: control, unassigned, private use, surrogates
WHITE = "\n\r\t"
REPLACEMENT = "\ufffd"  # what stands for bytes that are no UTF-8


def is_broken(text: str, allowed: float = 0.02) -> bool:
    """Whether more than a share of a text's characters are no characters at all."""
    broken = sum(char == REPLACEMENT or (char not in WHITE and unicodedata.category(char) in NOT_TEXT) for char in text)
    return broken > allowed * len(text)


def repeated_share(text: str) -> float:
    """Share of a text's 6-grams of characters that it has shown before; 0 of a short one."""
    if len(text) < SHORTEST:
        return 0.0
    grams = [text[i : i + GRAM] for i in range(len(text) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams)


def mean_interval(changes: Sequence[float], resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of paired changes, by resampling them (Efron 1979, "Bootstrap Methods").

    Args:
        changes: one a prompt.
        seed: the same changes have the same interval.
    """
    values = np.asarray(changes, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
