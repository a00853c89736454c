"""From text segments to token ids, and from rows of ids to padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from chatrlhf.data.templates import Template
from chatrlhf.errors import DataError
from chatrlhf.types import PromptBatch

IGNORED = -100  # a label that takes no part in the loss


@dataclass(frozen=True)
class Encoder:
    """Text to ids for one tokenizer and template; the one place where prompts and completions are tokenised."""

    tokenizer: Any
    template: Template
    max_length: int  # tokens of prompt and completion together

    def prompt(self, user_input: str) -> list[int]:
        """Ids of a rendered prompt, with BOS where the tokenizer is used to one."""
        return self._labelled_prompt(user_input, loss_on="completion")[0]

    def completion(self, text: str) -> list[int]:
        """Ids of a completion, closed by exactly one EOS."""
        return [*self._ids(self.template.completion(text)), self.tokenizer.eos_token_id]

    def labelled(self, user_input: str, completion: str, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids of prompt and completion with the labels of the SFT loss; what is not trained is `IGNORED`.

        Args:
            loss_on: ``completion``, ``all_turns`` (earlier assistant replies too) or ``all``.
        """
        prompt, labels = self._labelled_prompt(user_input, loss_on)
        answer = self.completion(completion)
        return prompt + answer, labels + answer

    def _labelled_prompt(self, user_input: str, loss_on: str) -> tuple[list[int], list[int]]:
        # One path for all uses, so that the ids of a prompt never depend on what is trained.
        ids = list(self._bos)
        labels = [IGNORED] * len(ids)
        for text, is_reply in self.template.segments(user_input):
            piece = self._ids(text)
            ids += piece
            trained = loss_on == "all" or (loss_on == "all_turns" and is_reply)
            labels += piece if trained else [IGNORED] * len(piece)
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    @cached_property
    def _bos(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        opening = self.tokenizer("a")["input_ids"][:1]
        return [bos] if bos is not None and opening == [bos] else []


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
    prompts: Sequence[Sequence[int]], texts: Sequence[str], pad_id: int, samples_per_prompt: int = 1
) -> PromptBatch:
    """Prompts, each repeated ``samples_per_prompt`` times in a row, left-padded.

    Args:
        prompts: ids of each prompt.
        texts: the user input of each prompt.
    """
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.bool)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
        mask[i, width - len(prompt) :] = True
    group = torch.arange(len(prompts))
    repeat = torch.repeat_interleave(group, samples_per_prompt)
    return PromptBatch(ids[repeat], mask[repeat], group[repeat], [texts[i] for i in repeat.tolist()])
