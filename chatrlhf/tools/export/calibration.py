"""Tokens of a user's file: those that a quantization looks at, and those that its perplexity is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatrlhf.data.encoder import Encoder
from chatrlhf.data.files import read_rows
from chatrlhf.data.records import from_json
from chatrlhf.data.stage_rows import demonstrations
from chatrlhf.data.templates import FORMATS, OWN, Template, get_template
from chatrlhf.errors import ConfigError, DataError


def tokens_of(path: Path, key: str, folder: Path, tokenizer: Any, most: int) -> list[int]:
    """The file's tokens one row behind the other, from its beginning: texts as they are, dialogues as in training.

    Args:
        key: the option that named the file, for messages.
        folder: of the model, beside which its template lies.
        most: no more rows are read once there are so many.

    Raises:
        ConfigError: the file holds dialogues and the model has no template.
        DataError: the file cannot be read.
    """
    template = Template.load(folder)
    if template is None and tokenizer.chat_template:
        template = get_template(OWN, key, tokenizer)
    encoder = Encoder.of(tokenizer, template or FORMATS["raw"], most)
    ids: list[int] = []
    for row in read_rows(path):
        record = from_json(row)
        if record.text is None and template is None:
            raise ConfigError(f"{key}: {path} holds dialogues and {folder} no template to show them by; name a text")
        rows = demonstrations(record)
        ids += encoder.actor_row(rows[0], "all")[0] if rows else encoder.prompt(record.prompt)
        if len(ids) >= most:
            break
    return ids


def pieces(ids: list[int], length: int, most: int, key: str) -> list[list[int]]:
    """Pieces of the same length, ``most`` at most, spread evenly over the tokens, none of them overlapping.

    Raises:
        DataError: there are too few tokens for one.
    """
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"{key}: {len(ids):,} tokens are too few for a piece of {length:,}; name a longer one, or less --length"
        )
    taken = min(count, most)
    return [ids[start : start + length] for start in (i * count // taken * length for i in range(taken))]
