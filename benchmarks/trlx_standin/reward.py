"""A reward that costs next to nothing, the same function for both loops: trlX's is the user's own."""

from __future__ import annotations


def even_words(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of words (`w123`) with an even number."""
    shares = []
    for completion in completions:
        words = completion.split()
        shares.append(sum(int(word[-1]) % 2 == 0 for word in words) / max(len(words), 1))
    return shares
