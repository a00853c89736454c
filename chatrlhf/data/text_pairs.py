"""A prompt and its completion as two texts, parted and closed as their tokenizer does it for an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.rendering import Rendered


def reads_pairs(tokenizer: Any) -> bool:
    """Whether a classifier with this tokenizer reads two texts: without a chat template, but with a separator."""
    return not tokenizer.chat_template and tokenizer.sep_token is not None


class TextPairEncoder(Encoder):
    """Rows such as ``[CLS] prompt [SEP] completion [SEP]``; the template renders the prompt alone.

    ``prompt`` and ``completion`` give the two halves of a row with the special tokens around them.
    """

    def prompt(self, prompt: Prompt | str) -> list[int]:
        opening, middle, _ = self._frame
        return [*opening, *super().prompt(prompt), *middle]

    def completion(self, prompt: Prompt | str, text: str) -> list[int]:
        return [*self._second(prompt, text), *self._frame[2]]

    def judged(self, prompt: Prompt | str, completion: str, finished: bool = True) -> list[int]:
        """Ids of both, however long, closed whether the completion came to an end or not."""
        return self.prompt(prompt) + self.completion(prompt, completion)

    def row(self, prompt: Prompt | str, completion: str) -> list[int]:
        """Ids of both; a row beyond the context loses the beginning of its prompt, then of its completion."""
        opening, middle, closing = self._frame
        first, second = super().prompt(prompt), self._second(prompt, completion)
        room = max(self.max_length - len(opening) - len(middle) - len(closing), 0)
        second = second[max(len(second) - room, 0) :]
        first = first[max(len(first) - (room - len(second)), 0) :]
        return [*opening, *first, *middle, *second, *closing]

    def prompt_lengths(self, prompts: Sequence[Prompt | str]) -> list[int]:
        around = len(self._frame[0]) + len(self._frame[1])
        return [length + around for length in super().prompt_lengths(prompts)]

    def completion_lengths(self, rows: Sequence[tuple[Prompt | str, str]]) -> list[int]:
        return [length - 1 + len(self._frame[2]) for length in super().completion_lengths(rows)]

    def separator(self) -> int | None:
        """The id that closes the first text where the tokenizer gives the second one another token type.

        Raises:
            ValueError: its token types do not depend on that alone.
        """
        encoded = self.tokenizer("a", "b")
        ids, types = encoded["input_ids"], encoded.get("token_type_ids")
        if not types or not any(types):
            return None
        middle = self._frame[1]
        found = middle[-1] if middle else None
        behind = ids.index(found) + 1 if found in ids else 0
        if types != [0] * behind + [1] * (len(ids) - behind):
            raise ValueError(f"token types {types} of two texts")
        return found

    def _second(self, prompt: Prompt | str, completion: str) -> list[int]:
        return self._following(self._renderer.reply(Prompt.of(prompt), completion, self._eos))

    def _following(self, reply: Rendered) -> list[int]:
        return self._tokens.ids(reply)  # a text of its own

    def _following_lengths(self, replies: Sequence[Rendered]) -> list[int]:
        return self._tokens.lengths(replies)

    @cached_property
    def _bos(self) -> list[int]:
        return []  # what opens a row is in its frame

    @cached_property
    def _frame(self) -> tuple[list[int], list[int], list[int]]:
        """The special tokens before the first text, between both, and behind the second."""
        encoded = self.tokenizer("a", "b", return_special_tokens_mask=True)
        parts: list[list[int]] = [[], [], []]
        texts = 0
        for is_special, run in groupby(
            zip(encoded["special_tokens_mask"], encoded["input_ids"], strict=True), lambda x: x[0]
        ):
            if is_special:
                parts[texts] = [token for _, token in run]
            else:
                texts += 1
        return parts[0], parts[1] if texts == 2 else [], parts[2] if texts == 2 else parts[1]
