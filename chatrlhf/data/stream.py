"""Text as one stream of tokens in a file, and rows of equal length out of it.

Documents lie behind each other, each closed by EOS, and a row begins where the one before it ended, in the midst of a
document or not: no token is padding. The stream has no end. Behind its last document the first follows, so that a text
that is read several times is cut at other places each time. In memory is one document, and later one row, at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from chatrlhf.data.collate import Encoder
from chatrlhf.data.views import PlainText


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


class StreamOrder(Sampler[int]):
    """The rows of all steps: those of a pass in an order that seed and pass draw, then those of the next.

    Args:
        rows: of all steps together.
        a_pass: rows of one pass over the stream.
        batch_size: rows of an optimizer step, of all ranks together.
    """

    def __init__(self, rows: int, a_pass: int, batch_size: int, seed: int) -> None:
        self.rows, self.a_pass, self.batch_size, self.seed = rows, a_pass, batch_size, seed

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer, to which all passes together are its one epoch."""

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        for number, start in enumerate(range(0, self.rows, self.a_pass)):
            generator = torch.Generator().manual_seed(self.seed + number)
            size = min(self.a_pass, self.rows - start)
            yield from (start + torch.randperm(size, generator=generator)).tolist()


def _ids(documents: Iterable[PlainText], encoder: Encoder) -> Iterator[list[int]]:
    for document in documents:
        yield from encoder.plain_parts(document.text, document.ends)


def _kind(encoder: Encoder) -> type[np.unsignedinteger]:
    return np.uint16 if len(encoder.tokenizer) <= 2**16 else np.uint32
