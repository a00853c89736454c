"""Conversations as text, and which stretches of it are data that look like special tokens.

A conversation is rendered as it is, so its text is that of `apply_chat_template`, to the letter. In two places more is
needed than the text: a special token that somebody wrote into a row has to stay text, and the end of a reply has to be
found. Both are answered by rendering once more with a mark inside the data: where the mark shows up, there the data
stands, and if anything else has changed, the template had looked at it and decided by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from chatrlhf.conversation import Prompt
from chatrlhf.data.templates import SpecialTokens, Template, arguments_of
from chatrlhf.errors import DataError

MARK = "\U000ff7e1"  # of a private plane: no template looks for it
# Special tokens that an assistant writes itself, and not only a template: <think>, [THINK], <|thought|>.
THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)
SHOWN = 40  # characters around a place, in messages

Span = tuple[int, int]  # of characters: first, behind the last


class Rendered(NamedTuple):
    """A rendered conversation."""

    text: str
    quoted: tuple[Span, ...] = ()  # data that look like special tokens, and are text

    def slice(self, start: int, end: int | None = None) -> Rendered:
        """A part of it; what is quoted lies inside or outside."""
        end = len(self.text) if end is None else end
        inside = tuple((a - start, b - start) for a, b in self.quoted if start <= a and b <= end)
        return Rendered(self.text[start:end], inside)


@dataclass(frozen=True)
class Renderer:
    """A template for one tokenizer's special tokens."""

    template: Template
    special_tokens: SpecialTokens
    control: re.Pattern[str] | None  # matches special tokens, which a row's text must not give

    def prompt(self, prompt: Prompt) -> Rendered:
        """A prompt up to where its reply begins.

        Raises:
            DataError: the template refuses it, or leaves out what a user or the system said.
        """
        arguments = arguments_of(prompt, self.template.takes_narrative)
        rendered = self._rendered(prompt, arguments, True)
        for message in arguments["messages"]:
            if message["role"] != "assistant" and message["content"].strip() not in rendered.text:
                raise self._fault(
                    prompt,
                    f"leaves out or changes the {message['role']}'s text {_short(message['content'])}; "
                    "change the row, or name another template",
                )
        return rendered

    def reply(self, prompt: Prompt, text: str, eos_token: str, asked: str | None = None) -> Rendered:
        """What a model has to give behind `prompt`, without the EOS token at its end.

        It is what the rendered conversation has more than the rendered prompt.

        Args:
            asked: the text of `prompt`, where it is known.

        Raises:
            DataError: the rendered conversation does not begin with the rendered prompt, so that a model would be
                trained to give something else than it is asked for; or the reply's end cannot be found.
        """
        asked = self.prompt(prompt).text if asked is None else asked
        whole = self.whole(prompt, text, eos_token)
        if not whole.text.startswith(asked):
            raise self._other_opening(prompt, asked, whole.text)
        return whole.slice(len(asked))

    def whole(self, prompt: Prompt, text: str, eos_token: str) -> Rendered:
        """Prompt and reply as one conversation, up to the EOS token that closes it."""
        arguments = arguments_of(prompt, self.template.takes_narrative, text)
        rendered = self._rendered(prompt, arguments, False)
        closing = self.template.frame(self.special_tokens).closing
        if not rendered.text.endswith(closing):
            closing = rendered.text[self._end_of(prompt, arguments, rendered.text) :]
        behind, eos, _ = closing.partition(eos_token)
        end = len(rendered.text) - len(closing) + (len(behind) if eos else 0)
        return rendered.slice(0, end)

    def earlier_replies(self, prompt: Prompt, rendered: Rendered, eos_token: str) -> list[Span]:
        """Where a rendered prompt holds what an assistant said, as the template marks it or else up to its EOS token.

        Raises:
            DataError: they cannot be found.
        """
        arguments = arguments_of(prompt, self.template.takes_narrative)
        if self.template.marks_replies:
            return self.template.marked_replies(arguments, self.special_tokens)
        behind, eos, _ = self.template.frame(self.special_tokens).between.partition(eos_token)
        ends = behind + eos if eos else ""
        spans = []
        for i, turn in enumerate(prompt.turns):
            if turn.role != "assistant":
                continue
            before = replace(prompt, turns=prompt.turns[:i], reply_name=turn.name)
            asked = self._rendered(before, arguments_of(before, self.template.takes_narrative), True).text
            if not rendered.text.startswith(asked):
                raise self._other_opening(prompt, asked, rendered.text)
            place = i + len(arguments["messages"]) - len(prompt.turns)
            end = self._end_of(prompt, arguments, rendered.text, place, asks=True)
            spans.append((len(asked), end + len(ends) if rendered.text.startswith(ends, end) else end))
        return spans

    def _rendered(self, prompt: Prompt, arguments: dict[str, Any], asks: bool) -> Rendered:
        try:
            text = self.template.render(arguments, self.special_tokens, asks)
            return Rendered(text, tuple(self._quoted(arguments, text, asks)))
        except DataError as error:
            raise DataError(f"{prompt.place}: {error}" if prompt.place else str(error)) from None

    def _quoted(self, arguments: dict[str, Any], text: str, asks: bool) -> Iterator[Span]:
        """Stretches of a rendering that are data and look like special tokens."""
        count = sum(len(found) for _, found in self._look_alikes(arguments))
        if not count:
            return
        marked = self._with_marks(arguments, asks, set(range(count)))
        if marked.replace(MARK, "") == text:
            yield from self._marked_spans(marked, text)
            return
        for number in range(count):  # the template looks at some of them: by itself, and not only by its place
            marked = self._with_marks(arguments, asks, {number})
            if marked.replace(MARK, "") == text:
                yield from self._marked_spans(marked, text)

    def _look_alikes(self, arguments: dict[str, Any]) -> Iterator[tuple[str, list[int]]]:
        """Each text of the arguments with the places behind the first character of what looks like a special token."""
        for message in arguments["messages"]:
            for name in ("content", "name"):
                yield from self._look_alikes_of(message.get(name, ""), message["role"] == "assistant")
        for name in ("narrative", "reply_name"):
            yield from self._look_alikes_of(arguments.get(name, ""), False)

    def _look_alikes_of(self, text: str, by_assistant: bool) -> Iterator[tuple[str, list[int]]]:
        found = list(self.control.finditer(text)) if self.control and text else []
        yield text, [match.start() + 1 for match in found if not (by_assistant and THOUGHT.search(match[0]))]

    def _with_marks(self, arguments: dict[str, Any], asks: bool, chosen: set[int]) -> str:
        """The rendering with a mark inside the chosen ones of the look-alikes."""
        texts, number = [], 0
        for text, places in self._look_alikes(arguments):
            cuts = [place for i, place in enumerate(places, number) if i in chosen]
            number += len(places)
            texts.append(MARK.join(text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)))
        given = iter(texts)
        messages = []
        for message in arguments["messages"]:
            marked = {name: next(given) for name in ("content", "name")}
            messages.append(message | {name: value for name, value in marked.items() if name in message})
        rest = {name: next(given) for name in ("narrative", "reply_name")}
        known = {name: value for name, value in rest.items() if name in arguments}
        return self.template.render(arguments | known | {"messages": messages}, self.special_tokens, asks)

    def _marked_spans(self, marked: str, text: str) -> Iterator[Span]:
        assert self.control is not None
        for number, mark in enumerate(re.finditer(MARK, marked)):
            start = mark.start() - number - 1
            if (match := self.control.match(text, start)) is not None:
                yield match.span()

    def _end_of(self, prompt: Prompt, arguments: dict[str, Any], text: str, place: int = -1, asks: bool = False) -> int:
        """Where the content of a message ends in a rendering."""
        messages = list(arguments["messages"])
        messages[place] = messages[place] | {"content": messages[place]["content"] + MARK}
        marked = self.template.render(arguments | {"messages": messages}, self.special_tokens, asks)
        if marked.count(MARK) == 1:
            head, tail = marked.split(MARK)
            end = len(text) - len(tail)
            # What a template would trim from the end stands before the mark, and is not trimmed there.
            if text.endswith(tail) and head[:end] == text[:end] and not head[end:].strip():
                return end
        raise self._fault(
            prompt,
            f"does not say where the reply {_short(messages[place]['content'].removesuffix(MARK))} ends; "
            "use a template with {% generation %} around replies, or another one",
        )

    def _other_opening(self, prompt: Prompt, asked: str, whole: str) -> DataError:
        same = next((i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), len(whole))
        start = max(same - SHOWN // 2, 0)
        return self._fault(
            prompt,
            f"asks for a reply by {asked[start:][:SHOWN]!r} and shows this one as {whole[start:][:SHOWN]!r}, so a "
            "model would be trained otherwise than it is asked: give the reply the thought that the prompt opens "
            "(<think>...</think> before the answer), switch thinking off (chat_template_kwargs), or name a .jinja file "
            "whose replies begin as add_generation_prompt asks",
            self.template.asking_line,
        )

    def _fault(self, prompt: Prompt, reason: str, line: int | None = None) -> DataError:
        row = f"{prompt.place}: " if prompt.place else ""
        where = f"{self.template.origin}, line {line}" if line else self.template.origin
        return DataError(f"{row}{where}: the template {reason}")


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
