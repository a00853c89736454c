"""Rendered text to ids, for any tokenizer: a prompt as `apply_chat_template` would, a reply as what follows it.

Three things are kept apart that one call of a tokenizer mixes up:

- Special tokens of the template are tokens; what looks like one in the data (`Rendered.quoted`) is text.
- A text at the very start may be treated in another way than one behind something (SentencePiece puts a blank
  before it). A prompt stands at the start. A reply stands behind the prompt, so it is tokenized behind the text that
  asks for it, and what belongs to that text is cut off again; where a token would reach over the border, the
  reply is tokenized as if it followed a special token.
- Tokens have places in the text, which tells what of a prompt an assistant said.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from chatrlhf.data.rendering import THOUGHT, Rendered, Span
from chatrlhf.errors import DataError

# Stand for special tokens where those are to be told from text that looks like them: one character each.
FIRST, LAST = 0x100000, 0x10FFFD
ANCHOR = chr(LAST)  # stands for any special token before a text
OURS = re.compile(f"[{chr(FIRST)}-{chr(LAST)}]")


@dataclass(frozen=True)
class Tokenization:
    """One tokenizer's way from text to ids and back."""

    tokenizer: Any

    def ids(self, rendered: Rendered) -> list[int]:
        """Ids of a text that stands at the start, with the special tokens that are written in it."""
        if not rendered.quoted:
            return list(self.tokenizer(rendered.text, add_special_tokens=False)["input_ids"])
        if self._backend is None:
            return self._by_parts(rendered)
        return self._encoded(self._replaced(rendered)).ids

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a text in which nothing is a special token."""
        if not text:
            return []
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def following_ids(self, rendered: Rendered, before: str) -> list[int]:
        """Ids of a text that stands behind another; see the top of this file.

        Args:
            before: template text directly before it, as far as it is the same for every row.
        """
        if not rendered.text:
            return []
        if self._backend is None:
            return self._by_parts(rendered)
        opening = ANCHOR + self._replaced(Rendered(before))
        text = self._replaced(rendered)
        for head in dict.fromkeys((opening, ANCHOR)):
            start, whole = self._ids_of_head(head), self._encoded(head + text).ids
            if whole[: len(start)] == start:
                return whole[len(start) :]
        raise DataError(f"the tokenizer joins text with the special token before it ({text[:40]!r}); use another one")

    def following_lengths(self, texts: Sequence[Rendered], before: str) -> list[int]:
        """How many `following_ids` each has; many are tokenized at once."""
        if self._backend is None or any(OURS.search(text.text) for text in texts):
            return [len(self.following_ids(text, before)) for text in texts]
        opening = ANCHOR + self._replaced(Rendered(before))
        start = self._ids_of_head(opening)
        joined = self._encoded_many([opening + self._replaced(text) for text in texts])
        return [
            len(ids) - len(start) if ids[: len(start)] == start else len(self.following_ids(text, before))
            for text, ids in zip(texts, joined, strict=True)
        ]

    def _ids_of_head(self, head: str) -> list[int]:
        """Ids of what stands before a reply, which is the same for every row."""
        if head not in self._heads:
            self._heads[head] = self._encoded(head).ids
        return self._heads[head]

    @cached_property
    def _heads(self) -> dict[str, list[int]]:
        return {}

    def inside(self, rendered: Rendered, ids: Sequence[int], spans: Sequence[Span]) -> list[bool]:
        """Which tokens begin inside one of the spans.

        Args:
            ids: what `ids` gave of the text.

        Raises:
            DataError: the tokenizer does not say where its tokens are.
        """
        if not spans:
            return [False] * len(ids)
        encoded = self._encoded(self._replaced(rendered)) if self._backend is not None else None
        if encoded is None or encoded.ids != list(ids):
            raise DataError(
                f"loss_on: this tokenizer ({type(self.tokenizer).__name__}) does not say where its tokens are in a "
                "text, so earlier replies cannot be told apart; set loss_on to completion"
            )
        places = self._places(rendered)
        moved = [(places(start), places(end)) for start, end in spans]
        return [any(a <= start < b for a, b in moved) for start, _ in encoded.offsets]

    def lengths(self, texts: Sequence[Rendered]) -> list[int]:
        """How many `ids` each has; many are tokenized at once, which takes less time."""
        if self._backend is None or any(OURS.search(each.text) for each in texts):
            return [len(self.ids(each)) for each in texts]
        return [len(ids) for ids in self._encoded_many([self._replaced(text) for text in texts])]

    def plain_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many `plain_ids` each has."""
        if self._backend is None or any(OURS.search(text) for text in texts):
            return [len(self.plain_ids(text)) for text in texts]
        return [len(ids) for ids in self._encoded_many(texts)]

    def _encoded_many(self, texts: Sequence[str]) -> list[list[int]]:
        assert self._backend is not None
        stood_for, encoded = self._stood_for, self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[stood_for.get(id, id) for id in each.ids] for each in encoded]

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens that follow others, special tokens left out but for those that mark a thought."""
        token, text = self._letter
        return self._decoded([token, *(id for id in ids if id not in self._hidden)]).removeprefix(text)

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @cached_property
    def control(self) -> re.Pattern[str] | None:
        """Matches special tokens, which only a template may give."""
        texts = sorted((re.escape(token.content) for token in self._special.values()), key=len, reverse=True)
        return re.compile("|".join(texts)) if texts else None

    @cached_property
    def closers(self) -> re.Pattern[str] | None:
        """Matches any token that was added to a vocabulary and is more than blanks: one of them closes a reply."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values())
        texts = sorted((re.escape(text) for text in added if text.strip()), key=len, reverse=True)
        return re.compile("|".join(texts)) if texts else None

    @cached_property
    def _special(self) -> dict[int, AddedToken]:
        added = self.tokenizer.added_tokens_decoder
        return {id: token for id, token in added.items() if token.special and token.content}

    @cached_property
    def _hidden(self) -> frozenset[int]:
        return frozenset(id for id, token in self._special.items() if not THOUGHT.search(token.content))

    @cached_property
    def _letter(self) -> tuple[int, str]:
        """An ordinary token with its text, for others to follow: decoders drop the blank of the first."""
        token = int(self.tokenizer("a", add_special_tokens=False)["input_ids"][-1])
        return token, self._decoded([token])

    @cached_property
    def _backend(self) -> Tokenizer | None:
        """A copy of the fast tokenizer, where it is one, that reads special tokens as text and stand-ins as tokens.

        A copy, because every call of a tokenizer sets padding and truncation anew, and threads may use it together.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return None
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        copy.post_processor = None  # it may trim the blanks from a token's place
        copy.encode_special_tokens = True  # as text
        stand_ins = [
            AddedToken(
                self._stand_in[token.content],
                special=False,
                normalized=token.normalized,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
            )
            for token in self._special.values()
        ]
        copy.add_tokens([*stand_ins, AddedToken(ANCHOR, special=False, normalized=False)])
        return copy if self._stands_for_them(copy) else None

    def _stands_for_them(self, copy: Tokenizer) -> bool:
        """Whether stand-ins give what special tokens give, alone, inside words and beside blanks."""
        own = {copy.token_to_id(self._stand_in[token.content]): id for id, token in self._special.items()}
        for token in self._special.values():
            for around in ("{}two", "one{}two", "one {}\ntwo", "one\n{} two"):
                shown, meant = around.format(self._stand_in[token.content]), around.format(token.content)
                ids = [own.get(id, id) for id in copy.encode(shown, add_special_tokens=False).ids]
                if ids != self.tokenizer(meant, add_special_tokens=False)["input_ids"]:
                    return False
        return True

    @cached_property
    def _stand_in(self) -> dict[str, str]:
        return {token.content: chr(FIRST + i) for i, token in enumerate(self._special.values())}

    @cached_property
    def _stood_for(self) -> dict[int, int]:
        """Ids of stand-ins to those of their special tokens."""
        assert self._backend is not None
        return {self._backend.token_to_id(self._stand_in[token.content]): id for id, token in self._special.items()}

    def _encoded(self, text: str) -> _Encoded:
        assert self._backend is not None
        encoding = self._backend.encode(text, add_special_tokens=False)
        stood_for = self._stood_for
        return _Encoded([stood_for.get(id, id) for id in encoding.ids], encoding.offsets)

    def _replaced(self, rendered: Rendered) -> str:
        """The text with stand-ins for the template's special tokens."""
        if (found := OURS.search(rendered.text)) is not None:
            raise DataError(
                f"a text holds {found[0]!r}, of a private plane of Unicode, whose characters stand for special tokens "
                "here; remove it"
            )
        parts, start = [], 0
        for a, b in self._special_spans(rendered):
            parts += [rendered.text[start:a], self._stand_in[rendered.text[a:b]]]
            start = b
        return "".join([*parts, rendered.text[start:]])

    def _special_spans(self, rendered: Rendered) -> Iterator[Span]:
        """Where the template's special tokens are."""
        start = 0
        for a, b in [*rendered.quoted, (len(rendered.text),) * 2]:
            if self.control is not None:
                yield from (match.span() for match in self.control.finditer(rendered.text, start, a))
            start = b

    def _places(self, rendered: Rendered) -> Any:
        """From places in the text to those in the text with stand-ins."""
        spans = list(self._special_spans(rendered))

        def moved(place: int) -> int:
            return place - sum(b - a - 1 for a, b in spans if b <= place)

        return moved

    def _by_parts(self, rendered: Rendered) -> list[int]:
        """For tokenizers written in Python: what stands between special tokens is tokenized by itself."""
        ids: list[int] = []
        start = 0
        for a, b in [*self._special_spans(rendered), (len(rendered.text),) * 2]:
            ids += self.plain_ids(rendered.text[start:a])
            if a < b:
                ids.append(self.tokenizer.convert_tokens_to_ids(rendered.text[a:b]))
            start = b
        return ids


@dataclass(frozen=True)
class _Encoded:
    ids: list[int]
    offsets: list[Span]
