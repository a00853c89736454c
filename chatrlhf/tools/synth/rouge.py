"""Which texts say nearly the same."""

from __future__ import annotations

import re
from collections import Counter

# Words; of scripts that put no blanks between them each character is one.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
NEAR = 0.7  # as Self-Instruct has it (Wang et al. 2023, section 2.2)


class Texts:
    """Texts of which none is a near-duplicate of another."""

    def __init__(self, near: float = NEAR) -> None:
        """
        Args:
            near: ROUGE-L from which two texts are near-duplicates.
        """
        self.near = near
        self._known: list[tuple[list[str], Counter[str]]] = []

    def take(self, text: str) -> bool:
        """Whether the text is new; if so, later ones are compared with it, too."""
        words = words_of(text)
        counts = Counter(words)
        for known, known_counts in self._known:
            total = len(words) + len(known)
            # A common subsequence is no longer than the words in common, which are counted much faster.
            fewest = self.near * total / 2
            if min(len(words), len(known)) < fewest or (counts & known_counts).total() < fewest:
                continue
            if 2 * longest_common(words, known) / total >= self.near:
                return False
        self._known.append((words, counts))
        return True


def words_of(text: str) -> list[str]:
    """The words of a text, without case and punctuation; of one that has none the text."""
    return WORD.findall(text.casefold()) or [text.strip()]


def longest_common(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, with one integer a row (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        common = row & places.get(word, 0)
        row = ((row + common) | (row - common)) & every
    return len(first) - row.bit_count()
