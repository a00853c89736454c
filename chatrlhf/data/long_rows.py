"""Rows of megabytes: named as soon as they are read, because counting their tokens takes seconds to minutes."""

from __future__ import annotations

import sys

LONG = 1_000_000  # characters of a row
CHARACTERS_A_SECOND = 250_000  # that a tokenizer takes, about


def announce_if_long(place: str, texts: list[str]) -> None:
    """One line on standard error about a row that is going to hold everything up.

    Args:
        place: file and row.
        texts: all that the row holds.
    """
    characters = sum(map(len, texts))
    if characters < LONG:
        return
    from chatrlhf.runtime.collectives import is_main  # it needs torch, which --help does without

    if is_main():
        print(
            f"note: {place}: a row of {characters:,} characters, whose tokens are counted in about "
            f"{characters / CHARACTERS_A_SECOND:.0f} s; cut it or leave it out if that is too long",
            file=sys.stderr,
            flush=True,
        )
