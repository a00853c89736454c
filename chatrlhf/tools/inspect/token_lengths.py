"""How many tokens the records of a file have, counted side by side while the next of them are read.

Nearly all of the time goes into tokenizing. The fast tokenizers release Python's lock while they do, so plain threads
are enough.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from chatrlhf.conversation import Conversation
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.stage_rows import completions_of, texts_of

CHUNK = 65_536  # characters that are tokenized at once, if they are not of a single record
OF_A_RECORD = 128  # characters that the rest of a record counts as: there may be no text in it
THREADS = min(os.cpu_count() or 1, 8)  # beyond that they would wait for the rows


@dataclass(frozen=True)
class Lengths:
    """Of a record, in tokens as training would count them."""

    prompt: int | None  # None: it is plain text
    completions: tuple[int, ...]
    whole: int  # the prompt with its longest completion, or the text


def lengths_of(records: Iterable[Conversation], encoder: Encoder) -> Iterator[Lengths]:
    """Those of each record, in their order; a few chunks of records are in memory at a time.

    Raises:
        DataError: the template cannot show a prompt; or what reading the records raises.
    """
    running: deque[Future[list[Lengths]]] = deque()
    with ThreadPoolExecutor(THREADS, "chatrlhf-lengths") as pool:
        for chunk in _chunks(records):
            running.append(pool.submit(_of_chunk, chunk, encoder))
            if len(running) > THREADS:  # so that none of them waits for work
                yield from running.popleft().result()
        while running:
            yield from running.popleft().result()


def _chunks(records: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    chunk: list[Conversation] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += OF_A_RECORD + sum(map(len, texts_of(record)))
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _of_chunk(records: Sequence[Conversation], encoder: Encoder) -> list[Lengths]:
    talks = [record for record in records if record.text is None]
    texts = iter(encoder.plain_lengths([record.text for record in records if record.text is not None]))
    prompts = iter(encoder.prompt_lengths([record.prompt for record in talks]))
    completions = iter(
        encoder.completion_lengths([(record.prompt, text) for record in talks for text in completions_of(record)])
    )
    lengths = []
    for record in records:
        if record.text is not None:
            lengths.append(Lengths(None, (), next(texts)))
            continue
        prompt, own = next(prompts), tuple(islice(completions, len(completions_of(record))))
        lengths.append(Lengths(prompt, own, prompt + max(own, default=0)))
    return lengths
