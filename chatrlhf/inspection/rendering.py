"""A record as a model sees it, with what it is trained on marked."""

from __future__ import annotations

from itertools import groupby

from rich.text import Text

from chatrlhf.data.collate import IGNORED, Encoder
from chatrlhf.data.views import ActorRow

OPENING, CLOSING = "⟦", "⟧"  # around what is trained, where there is no colour


def marked(row: ActorRow, encoder: Encoder, loss_on: str, in_colour: bool) -> Text:
    """The text of a row's tokens; what has a label is underlined, or in brackets where there is no colour."""
    ids, labels = encoder.actor_row(row, loss_on)
    text = Text()
    for trained, stretch in groupby(zip(ids, labels, strict=True), key=lambda token: token[1] != IGNORED):
        shown = encoder.tokenizer.decode([token for token, _ in stretch], skip_special_tokens=False)
        if not trained:
            text.append(shown, "dim")
        elif in_colour:
            text.append(shown, "green underline")
        else:
            text.append(f"{OPENING}{shown}{CLOSING}")
    return text


def measure(row: ActorRow, encoder: Encoder, loss_on: str) -> str:
    """How many tokens a row has, and how many of them are trained."""
    ids, labels = encoder.actor_row(row, loss_on)
    trained = sum(label != IGNORED for label in labels)
    over = f", beyond the context of {encoder.max_length:,}" if len(ids) > encoder.max_length else ""
    return f"{len(ids):,} tokens, {trained:,} of them trained{over}"
