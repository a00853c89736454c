"""From text segments to token ids, and from rows of ids to padded tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from chatrlhf.conversation import Prompt
from chatrlhf.data.templates import Piece, SpecialTokens, Template
from chatrlhf.data.views import ActorRow, Demonstration, PlainText
from chatrlhf.errors import DataError
from chatrlhf.types import PromptBatch

IGNORED = -100  # a label that takes no part in the loss
PART_OF_TEXT = 2**18  # characters that are tokenised at once
Part = str | int  # of what is tokenised: a text, or the id of a special token


@dataclass(frozen=True)
class Encoder:
    """Text to ids and back for one tokenizer and template; the one place where prompts and completions are tokenised.

    Prompt, earlier replies and completion are tokenised separately and joined as ids, for every use alike. Special
    tokens come from the template alone: what looks like one in the data is tokenised as the text that it is.
    """

    tokenizer: Any
    template: Template
    max_length: int  # tokens of prompt and completion together

    @classmethod
    def of(cls, tokenizer: Any, template: Template, max_length: int) -> Encoder:
        """An encoder whose replies end as the template closes them.

        Where the template closes a reply by a special token that is not the tokenizer's EOS (``<|im_end|>`` with a base
        model's tokenizer), it becomes that: it is what a policy has to give, and what ends a rollout.
        """
        closing = template.around_reply(special_tokens(tokenizer))[1]
        encoder = cls(tokenizer, template, max_length)
        closers = encoder._special_pattern.findall(closing) if encoder._special_pattern else []
        if closers and tokenizer.eos_token not in closers:
            tokenizer.eos_token = closers[0].strip()
        return cls(tokenizer, template, max_length)

    def prompt(self, prompt: Prompt | str) -> list[int]:
        """Ids of a rendered prompt, with BOS where the tokenizer is used to one."""
        return self._labelled_prompt(prompt, loss_on="completion")[0]

    def completion(self, text: str) -> list[int]:
        """Ids of a completion, closed by exactly one EOS."""
        return [*self._ids_of(self._completion_parts(text)), self.tokenizer.eos_token_id]

    def reply(self, ids: Sequence[int]) -> str:
        """The text of a completion that a model gave, without what the template puts around it."""
        before, behind = self._shown_around_reply
        return self.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(before).removesuffix(behind)

    def labelled(self, prompt: Prompt | str, completion: str, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids of prompt and completion with the labels of the SFT loss; what is not trained is `IGNORED`.

        Args:
            loss_on: ``completion``, ``all_turns`` (earlier assistant replies too) or ``all``.
        """
        ids, labels = self._labelled_prompt(prompt, loss_on)
        answer = self.completion(completion)
        return ids + answer, labels + answer

    def actor_row(self, row: ActorRow, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids and labels of a row of the ACTOR stage; of plain text everything is trained.

        Args:
            loss_on: as in `labelled`, where the row's dataset says nothing.
        """
        if isinstance(row, PlainText):
            return self.plain(row.text, row.ends)
        return self.labelled(row.prompt, row.completion, row.loss_on or loss_on)

    def cut_actor_row(self, row: ActorRow, loss_on: str) -> tuple[list[int], list[int]]:
        """As `actor_row`, within the context: without the oldest turns, and if that is not enough without its end."""
        ids, labels = self.actor_row(self.recent_row(row), loss_on)
        return ids[: self.max_length], labels[: self.max_length]

    def row_length(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        """Tokens of a row of the ACTOR stage, which are bounded, given what `actor_row` makes of it."""
        return len(ids)

    def recent_row(self, row: ActorRow) -> ActorRow:
        """The row without as many of its prompt's oldest turns as have to go for the context."""
        if not isinstance(row, Demonstration):
            return row
        room = self.max_length - len(self.completion(row.completion))
        return replace(row, prompt=self.recent(row.prompt, room))

    def recent(self, prompt: Prompt, room: int) -> Prompt:
        """The prompt without its oldest turns, as many as have to go for ``room`` tokens; the last one stays."""
        while len(prompt.turns) > 1 and len(self.prompt(prompt)) > room:
            turns = prompt.turns[1:]
            # What is left begins with a user's turn, as every dialogue does, where there is one.
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
            prompt = replace(prompt, turns=turns[first:])
        return prompt

    def plain(self, text: str, ends: bool = True) -> tuple[list[int], list[int]]:
        """Ids and labels of plain text, all of it trained; EOS where the document ends."""
        ids = [*self._ids(text), *([self.tokenizer.eos_token_id] if ends else [])]
        return [*self._bos, *ids], [*([IGNORED] * len(self._bos)), *ids]

    def plain_parts(self, text: str, ends: bool = True) -> Iterator[list[int]]:
        """The ids of `plain` a part at a time; no token reaches over the end of a part, which is a word's."""
        yield self._bos
        start = 0
        while start < len(text):
            end = start + PART_OF_TEXT
            if end < len(text):
                end = max(text.rfind(" ", start + 1, end), 0) or end
            yield self._ids(text[start:end])
            start = end
        yield [self.tokenizer.eos_token_id] if ends else []

    def prompt_lengths(self, prompts: Sequence[Prompt | str]) -> list[int]:
        """How many ids `prompt` gives of each; many are tokenised at once, which takes less time."""
        rows = [[part for _, parts in self._prompt_parts(prompt) for part in parts] for prompt in prompts]
        return [len(ids) + (len(self._bos) if ids[:1] != self._bos else 0) for ids in self._ids_of_many(rows)]

    def completion_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids `completion` gives of each, its EOS included."""
        return [len(ids) + 1 for ids in self._ids_of_many([self._completion_parts(text) for text in texts])]

    def plain_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids `plain` gives of each document that ends."""
        rows = [self._parts([Piece(text, True, False)]) for text in texts]
        return [len(self._bos) + len(ids) + 1 for ids in self._ids_of_many(rows)]

    @cached_property
    def chat_template(self) -> Template:
        """The template as it is saved: for transformers' users too it gives the ids that this encoder gives."""
        opens_itself = self.prompt("a")[:1] == self._bos and self._rendered("a")[:1] == self._bos
        if not self._bos or opens_itself:
            return self.template
        return Template("{{- bos_token -}}" + self.template.source)

    def save(self, folder: Path) -> None:
        """Write tokenizer and template beside a model's weights."""
        self.tokenizer.save_pretrained(folder)
        self.chat_template.save(folder)

    def _labelled_prompt(self, prompt: Prompt | str, loss_on: str) -> tuple[list[int], list[int]]:
        # One path for all uses, so that the ids of a prompt never depend on what is trained.
        ids: list[int] = []
        labels: list[int] = []
        for is_reply, parts in self._prompt_parts(prompt):
            piece = self._ids_of(parts)
            ids += piece
            trained = loss_on == "all" or (loss_on == "all_turns" and is_reply)
            labels += piece if trained else [IGNORED] * len(piece)
        if self._bos and ids[:1] != self._bos:  # a template may bring its own
            return [*self._bos, *ids], [IGNORED, *labels]
        return ids, labels

    def _prompt_parts(self, prompt: Prompt | str) -> list[tuple[bool, list[Part]]]:
        """Parts of a prompt, in stretches that belong to an earlier reply or do not."""
        pieces = self.template.pieces(Prompt.of(prompt), self._special_tokens)
        stretches = groupby(pieces, key=lambda piece: piece.is_reply)
        return [(is_reply, self._parts(stretch)) for is_reply, stretch in stretches]

    def _completion_parts(self, text: str) -> list[Part]:
        before, behind = self._around_reply
        return self._parts([Piece(before, False, True), Piece(text, True, True), Piece(behind, False, True)])

    def _rendered(self, prompt: str) -> list[int]:
        return self._rendered_ids(self.template.pieces(Prompt.of(prompt), self._special_tokens))

    def _rendered_ids(self, pieces: Iterable[Piece]) -> list[int]:
        return self._ids_of(self._parts(pieces))

    def _parts(self, pieces: Iterable[Piece]) -> list[Part]:
        """Template and data as texts to tokenise; special tokens cut the text as they do in any tokenizer."""
        parts: list[Part] = []
        run = ""
        for piece in pieces:
            if piece.is_data:
                run += piece.text
                continue
            texts = self._special_pattern.split(piece.text) if self._special_pattern else [piece.text]
            for i, text in enumerate(texts):
                if i % 2:
                    parts += [run, self._special_ids[text.strip()]]
                    run = ""
                else:
                    run += text
        return [part for part in [*parts, run] if part != ""]

    def _ids_of(self, parts: Iterable[Part]) -> list[int]:
        return list(chain.from_iterable(self._ids(part) if isinstance(part, str) else (part,) for part in parts))

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _ids_of_many(self, rows: Sequence[list[Part]]) -> Iterator[list[int]]:
        """What `_ids_of` gives of each row."""
        texts = [part for parts in rows for part in parts if isinstance(part, str)]
        if self._backend is not None:
            encoded = (encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False))
        else:
            encoded = map(self._ids, texts)
        for parts in rows:
            yield list(chain.from_iterable(next(encoded) if isinstance(part, str) else (part,) for part in parts))

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """What the tokenizer itself asks, where it has one: without the offsets it takes a third less time.

        A copy, because every call of the tokenizer sets its own anew, and threads may use this one together.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.encode_special_tokens = True  # as text
        return copy

    @cached_property
    def _around_reply(self) -> tuple[str, str]:
        """What the template puts before a reply's text, and between it and its EOS."""
        before, closing = self.template.around_reply(self._special_tokens)
        behind, eos, _ = closing.partition(self.tokenizer.eos_token)
        return before, behind if eos else ""

    @cached_property
    def _shown_around_reply(self) -> tuple[str, str]:
        before, behind = (self._rendered_ids([Piece(text, False, True)]) for text in self._around_reply)
        return tuple(self.tokenizer.decode(ids, skip_special_tokens=True) for ids in (before, behind))

    @cached_property
    def _special_tokens(self) -> SpecialTokens:
        return special_tokens(self.tokenizer)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        return {token.content.strip(): id for id, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        tokens = sorted(self.tokenizer.added_tokens_decoder.values(), key=lambda token: -len(token.content))
        # Some swallow the blanks beside them.
        texts = [
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in tokens
        ]
        return re.compile(f"({'|'.join(texts)})") if texts else None

    @cached_property
    def _bos(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        opening = self.tokenizer("a")["input_ids"][:1]
        return [bos] if bos is not None and opening == [bos] else []


def special_tokens(tokenizer: Any) -> SpecialTokens:
    """A tokenizer's special tokens with their names, as chat templates are given them."""
    return tuple((name, token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str))


def fitting(rows: Sequence[Any], lengths: Sequence[int], max_length: int, source: str) -> tuple[list[Any], int]:
    """Rows of at most ``max_length`` tokens and how many were dropped.

    Raises:
        DataError: none is left.
    """
    kept = [row for row, length in zip(rows, lengths, strict=True) if length <= max_length]
    if not kept:
        raise DataError(
            f"{source}: all {len(rows)} rows are longer than the context (shortest {min(lengths)} tokens, limit "
            f"{max_length}); raise max_sequence_length or shorten the rows"
        )
    return kept, len(rows) - len(kept)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ragged ids as [N, T] int64 and their mask [N, T] bool, padding on the right."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[i, : len(row)] = True
    return ids, mask


def prompt_batch(
    ids_of: Sequence[Sequence[int]], prompts: Sequence[Prompt | str], pad_id: int, samples_per_prompt: int = 1
) -> PromptBatch:
    """Prompts, each repeated ``samples_per_prompt`` times in a row, left-padded.

    Args:
        ids_of: ids of each prompt.
        prompts: the same, as they stand in the data.
    """
    width = max(len(ids) for ids in ids_of)
    ids = torch.full((len(ids_of), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(ids_of), width), dtype=torch.bool)
    for i, row in enumerate(ids_of):
        ids[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        mask[i, width - len(row) :] = True
    group = torch.arange(len(ids_of))
    repeat = torch.repeat_interleave(group, samples_per_prompt)
    return PromptBatch(ids[repeat], mask[repeat], group[repeat], [Prompt.of(prompts[i]) for i in repeat.tolist()])
