"""Encoder: what the stages ask of a tokenizer and a template, prompt and completion joined as ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from chatrlhf.conversation import Prompt
from chatrlhf.data.rendering import Rendered, Renderer
from chatrlhf.data.stage_rows import ActorRow, Demonstration, PlainText
from chatrlhf.data.templates import SpecialTokens, Template
from chatrlhf.data.tokenization import Tokenization
from chatrlhf.errors import DataError

IGNORED = -100  # a label that takes no part in the loss
PART_OF_TEXT = 2**18  # characters that are tokenized at once


@dataclass(frozen=True)
class Encoder:
    """Text to ids and back for one tokenizer and template; the one place where prompts and completions are tokenized.

    A prompt's ids are those of `apply_chat_template`; a completion is tokenized as what follows it; both are joined
    as ids, for every use alike (`rendering.py`, `tokenization.py`). Special tokens come from the template alone: what
    looks like one in the data is tokenized as the text that it is.
    """

    tokenizer: Any
    template: Template
    max_length: int  # tokens of prompt and completion together

    @classmethod
    def of(cls, tokenizer: Any, template: Template, max_length: int) -> Encoder:
        """An encoder whose replies end as the template closes them.

        Where the template closes a reply by a token that is not the tokenizer's EOS (``<|im_end|>`` with a base
        model's tokenizer), it becomes that: it is what a policy has to give, and what ends a rollout. A template may
        close earlier replies alone, and leave the last one open.
        """
        frame, pattern = template.frame(special_tokens(tokenizer)), Tokenization(tokenizer).closers
        closers = pattern.findall(frame.closing) if pattern else []
        if pattern and not closers:
            opens_a_turn = set(pattern.findall(frame.opening))
            closers = [token for token in pattern.findall(frame.between) if token not in opens_a_turn]
        if closers and tokenizer.eos_token not in closers:
            tokenizer.eos_token = closers[0]
        return cls(tokenizer, template, max_length)

    def prompt(self, prompt: Prompt | str) -> list[int]:
        """Ids of a prompt: those of `apply_chat_template` with ``add_generation_prompt``."""
        return self._tokens.ids(self._renderer.prompt(Prompt.of(prompt)))

    def completion(self, prompt: Prompt | str, text: str) -> list[int]:
        """Ids of what a model has to give behind a prompt, closed by exactly one EOS.

        Raises:
            DataError: the template shows the reply in another way than it asks for it.
        """
        return self._closed(self._renderer.reply(Prompt.of(prompt), text, self._eos))

    def labelled(self, prompt: Prompt | str, completion: str, loss_on: str) -> tuple[list[int], list[int]]:
        """Ids of prompt and completion with the labels of the SFT loss; what is not trained is `IGNORED`.

        Args:
            loss_on: ``completion``, ``all_turns`` (earlier assistant replies too) or ``all``.
        """
        prompt = Prompt.of(prompt)
        asked = self._renderer.prompt(prompt)
        ids = self._tokens.ids(asked)
        answer = self._closed(self._renderer.reply(prompt, completion, self._eos, asked.text))
        return ids + answer, self._prompt_labels(prompt, asked, ids, loss_on) + answer

    def judged(self, prompt: Prompt | str, completion: str, finished: bool = True) -> list[int]:
        """Ids of prompt and completion as a reward model reads them; EOS at the end where the completion came to one.

        They are those of `labelled`. Where a template shows a reply in another way than it asks for it, they are those
        of the conversation as it is shown.
        """
        prompt = Prompt.of(prompt)
        asked, whole = self._renderer.prompt(prompt), self._renderer.whole(prompt, completion, self._eos)
        if whole.text.startswith(asked.text):
            ids = self._tokens.ids(asked) + self._following(whole.slice(len(asked.text)))
        else:
            ids = self._tokens.ids(whole)
        return [*ids, self.tokenizer.eos_token_id] if finished else ids

    def reply(self, ids: Sequence[int]) -> str:
        """The text of a completion that a model gave, without what the template puts around it."""
        openings, behind = self._around_reply
        text = self._tokens.text(ids)
        opening = next((each for each in openings if text.startswith(each)), "")
        return text.removeprefix(opening).removesuffix(behind)

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
        room = self.max_length - len(self.completion(row.prompt, row.completion))
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
        ids = [*self._tokens.plain_ids(text), *([self.tokenizer.eos_token_id] if ends else [])]
        return [*self._bos, *ids], [*([IGNORED] * len(self._bos)), *ids]

    def plain_parts(self, text: str, ends: bool = True) -> Iterator[list[int]]:
        """The ids of `plain` a part at a time; no token reaches over the end of a part, which is a word's."""
        yield self._bos
        start = 0
        while start < len(text):
            end = start + PART_OF_TEXT
            if end < len(text):
                end = max(text.rfind(" ", start + 1, end), 0) or end
            yield self._tokens.plain_ids(text[start:end])
            start = end
        yield [self.tokenizer.eos_token_id] if ends else []

    def prompt_lengths(self, prompts: Sequence[Prompt | str]) -> list[int]:
        """How many ids `prompt` gives of each; many are tokenized at once, which takes less time."""
        return self._tokens.lengths([self._renderer.prompt(Prompt.of(prompt)) for prompt in prompts])

    def completion_lengths(self, rows: Sequence[tuple[Prompt | str, str]]) -> list[int]:
        """How many ids `completion` gives of each prompt with its completion, the EOS included."""
        replies = [self._renderer.reply(Prompt.of(prompt), text, self._eos) for prompt, text in rows]
        return [length + 1 for length in self._following_lengths(replies)]

    def plain_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many ids `plain` gives of each document that ends."""
        return [len(self._bos) + length + 1 for length in self._tokens.plain_lengths(texts)]

    @cached_property
    def chat_template(self) -> Template:
        """The template as it is rendered and saved: it opens a text with BOS where the tokenizer does."""
        special = special_tokens(self.tokenizer)
        bos = self.tokenizer.bos_token
        shown = self.template.render({"messages": [{"role": "user", "content": "a"}]}, special, True)
        if not self._bos or shown.startswith(bos):
            return self.template
        # A tokenizer that puts a blank before a text (Llama's) does so behind its own BOS, and not behind one that is
        # written in the text: then the template writes the blank as well.
        natural = self.tokenizer(shown)["input_ids"]
        openings = {f"{bos} ": "{{- bos_token + ' ' }}", bos: "{{- bos_token }}"}
        written = {opening: self._tokens.ids(Rendered(opening + shown)) for opening in openings}
        fitting = [opening for opening, ids in written.items() if natural[: len(ids)] == ids]
        return replace(self.template, source=openings[(fitting or [bos])[-1]] + self.template.source)

    @cached_property
    def ids_inside_replies(self) -> frozenset[int]:
        """Ids that the template puts into a reply of plain words, before its EOS."""
        lead, closing, *_ = self.chat_template.frame(self._renderer.special_tokens)
        behind, eos, _ = closing.partition(self._eos)
        return frozenset(self._following(Rendered(f"{lead}a{behind if eos else ''}")))

    def save(self, folder: Path) -> None:
        """Write tokenizer and template beside a model's weights."""
        self.tokenizer.save_pretrained(folder)
        self.saved_template.save(folder)

    @property
    def saved_template(self) -> Template:
        """As transformers' users are to render it."""
        return self.chat_template

    def _prompt_labels(self, prompt: Prompt, asked: Rendered, ids: list[int], loss_on: str) -> list[int]:
        if loss_on == "completion":
            return [IGNORED] * len(ids)
        if loss_on == "all":
            trained = [True] * len(ids)
        else:
            spans = self._renderer.earlier_replies(prompt, asked, self._eos)
            trained = self._tokens.inside(asked, ids, spans)
        opens = bool(self._bos) and ids[:1] == self._bos  # BOS is nothing that a model gives
        return [
            id if learned and not (opens and i == 0) else IGNORED
            for i, (id, learned) in enumerate(zip(ids, trained, strict=True))
        ]

    def _closed(self, reply: Rendered) -> list[int]:
        return [*self._following(reply), self.tokenizer.eos_token_id]

    def _following(self, reply: Rendered) -> list[int]:
        return self._tokens.following_ids(reply, self._asks)

    def _following_lengths(self, replies: Sequence[Rendered]) -> list[int]:
        return self._tokens.following_lengths(replies, self._asks)

    @cached_property
    def _tokens(self) -> Tokenization:
        return Tokenization(self.tokenizer)

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.chat_template, special_tokens(self.tokenizer), self._tokens.control)

    @cached_property
    def _asks(self) -> str:
        """The template's own text before a reply, behind the last special token in it."""
        asks = self.chat_template.frame(self._renderer.special_tokens).asks
        return self._tokens.control.split(asks)[-1] if self._tokens.control else asks

    @cached_property
    def _around_reply(self) -> tuple[list[str], str]:
        """What the decoded ids of a reply of plain words have before the words, the longest first, and behind them.

        Some tokenizers put a blank before the words, and not before all words.
        """
        lead, closing, *_ = self.chat_template.frame(self._renderer.special_tokens)
        behind, eos, _ = closing.partition(self._eos)
        opening, whole = (self._tokens.text(self._following(Rendered(lead + end))) for end in ("a", f"a{behind}"))
        before = opening.removesuffix("a")
        return [before, lead, before.rstrip()], whole.removeprefix(opening) if eos else ""

    @property
    def _eos(self) -> str:
        return self.tokenizer.eos_token or self.tokenizer.sep_token

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
