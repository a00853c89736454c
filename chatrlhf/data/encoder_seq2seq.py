"""Prompts and replies for an encoder–decoder: two sequences, where a causal model reads one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.rendering import Rendered
from chatrlhf.data.stage_rows import ActorRow, Demonstration
from chatrlhf.data.templates import Template
from chatrlhf.errors import DataError


class Seq2SeqEncoder(Encoder):
    """A prompt is closed as its tokenizer closes any text (T5: by EOS), since its reply does not follow it.

    ``max_length`` bounds prompt and reply together, as in an `Encoder`.
    """

    def actor_row(self, row: ActorRow, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, for the encoder, and of the completion, all of which is trained.

        Raises:
            DataError: see `refuse_row`.
        """
        refuse_row(row)
        return self.labelled(row.prompt, row.completion, loss_on)

    def cut_actor_row(self, row: ActorRow, loss_on: str) -> tuple[list[int], list[int]]:
        """As `actor_row`, within the context: without the oldest turns, and if that is not enough without its end."""
        ids, labels = self.actor_row(self.recent_row(row), loss_on)
        return ids, labels[: max(self.max_length - len(ids), 0)]

    def row_length(self, ids: Sequence[int], labels: Sequence[int]) -> int:
        return len(ids) + len(labels)

    def prompt(self, prompt: Prompt | str) -> list[int]:
        return super().prompt(prompt) + self._closing

    def prompt_lengths(self, prompts: Sequence[Prompt | str]) -> list[int]:
        return [length + len(self._closing) for length in super().prompt_lengths(prompts)]

    def labelled(self, prompt: Prompt | str, completion: str, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt and of the completion, which are two texts here."""
        return self.prompt(prompt), self.completion(prompt, completion)

    @property
    def saved_template(self) -> Template:
        return self.chat_template.closing_prompts() if self._closing else self.chat_template

    def _following(self, reply: Rendered) -> list[int]:
        # A decoder begins afresh, so its text stands at the start.
        return self._tokens.ids(reply)

    def _following_lengths(self, replies: Sequence[Rendered]) -> list[int]:
        return self._tokens.lengths(replies)

    @cached_property
    def _closing(self) -> list[int]:
        eos = self.tokenizer.eos_token_id
        return [eos] if self.tokenizer("a")["input_ids"][-1:] == [eos] else []


def refuse_row(row: ActorRow) -> None:
    """A DataError where a row has no prompt, or something other than its completion is to be trained."""
    if not isinstance(row, Demonstration):
        raise DataError(
            "an encoder-decoder needs a prompt to read, and a row of the ACTOR stage is plain text "
            f"({row.text[:40]!r}); leave such rows out"
        )
    if row.loss_on not in (None, "completion"):
        raise DataError(
            f"loss_on: a dataset asks for a loss on {row.loss_on!r}, and an encoder-decoder predicts no token of a "
            "prompt; set loss_on of that dataset to completion"
        )
