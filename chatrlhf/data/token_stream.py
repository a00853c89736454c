"""Text as one stream of tokens in a file, and rows of equal length out of it.

Documents lie behind each other, each closed by EOS, and a row begins where the one before it ended, in the midst of a
document or not: no token is padding. The stream has no end. Behind its last document the first follows, so that a text
that is read several times is cut at other places each time. In memory is one document, and later one row, at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from chatrlhf.data.encoder import Encoder
from chatrlhf.data.row_sampler import RowOrder, Seen
from chatrlhf.data.stage_rows import PlainText


def write_stream(documents: Iterable[PlainText], encoder: Encoder, most: int, path: Path) -> int:
    """Write the tokens of documents into a file, and read no further than ``most`` of them.

    Returns:
        How many they are.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    written, kind = 0, _kind(encoder)
    with path.open("wb") as file:
        for ids in _ids(documents, encoder):
            ids = ids[: most - written]
            file.write(np.array(ids, dtype=kind).tobytes())
            written += len(ids)
            if written == most:
                break
    return written


class Windows(Dataset):
    """Rows of ``length`` tokens, each with its own ids for labels: row i begins at token i * length.

    Args:
        path: from `write_stream`, with the same encoder.
    """

    def __init__(self, path: Path, encoder: Encoder, length: int) -> None:
        self.stream = np.memmap(path, dtype=_kind(encoder), mode="r")
        self.length = length

    def __len__(self) -> int:
        """Whole rows of one pass over the stream; more can be asked for."""
        return len(self.stream) // self.length

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        places = (number * self.length + np.arange(self.length)) % len(self.stream)
        ids = torch.from_numpy(self.stream[places].astype(np.int64))
        return {"input_ids": ids, "labels": ids.clone()}


class StreamOrder(RowOrder):
    """The rows of all steps: those of a pass in an order that seed and pass draw, then those of the next.

    A run that is resumed for another number of steps, or with another batch size, has another number of rows, and draws
    its passes anew, without the rows that were seen.

    Args:
        rows: of all steps together.
        a_pass: rows of one pass over the stream.
        batch_size: rows of an optimizer step, of all ranks together.
    """

    def __init__(self, rows: int, a_pass: int, batch_size: int, seed: int) -> None:
        super().__init__(batch_size)
        self.rows, self.a_pass, self.seed = rows, a_pass, seed
        self.drawn: list[list[int]] = []  # rows, rows of a pass, and rows seen at its end, of each earlier drawing

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, to which all passes together are its one epoch."""

    def __len__(self) -> int:
        return self.rows

    def of(self, epoch: int) -> list[int]:
        order: list[int] = []
        for rows, a_pass, end in [*self.drawn, [self.rows, self.a_pass, self.rows]]:
            seen = set(order)
            order += [row for row in self._shuffled(rows, a_pass) if row not in seen][: end - len(order)]
        return order

    def advance(self) -> None:
        self.seen = Seen(0, min(self.seen.rows + self.batch_size, len(self)))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"drawn": [*self.drawn, [self.rows, self.a_pass, self.seen.rows]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"rows_of_an_epoch": len(self)})
        self.drawn = state["drawn"]

    def _shuffled(self, rows: int, a_pass: int) -> Iterator[int]:
        for number, start in enumerate(range(0, rows, a_pass)):
            generator = torch.Generator().manual_seed(self.seed + number)
            size = min(a_pass, rows - start)
            yield from (start + torch.randperm(size, generator=generator)).tolist()


def _ids(documents: Iterable[PlainText], encoder: Encoder) -> Iterator[list[int]]:
    for document in documents:
        yield from encoder.plain_parts(document.text, document.ends)


def _kind(encoder: Encoder) -> type[np.unsignedinteger]:
    return np.uint16 if len(encoder.tokenizer) <= 2**16 else np.uint32
