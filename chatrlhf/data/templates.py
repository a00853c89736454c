"""How a prompt becomes the text a model sees.

Every template is a Jinja chat template: one of the formats that published models were trained with (`formats/`), the
model's own, or a file of the user's. It is rendered with stand-ins in the place of all texts of the data, which are
put in afterwards. So nothing in a user's text can act on the template, no part of it is taken for a special token,
and where each reply begins and ends is known by construction. Rendering is transformers', in its sandbox: a template
cannot reach Python.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from chatrlhf.boundary import doing
from chatrlhf.conversation import Prompt, Turn
from chatrlhf.data.time_limit import cpu_limit
from chatrlhf.errors import ConfigError, DataError

PLACEHOLDER = "{user_input}"
FILE_NAME = "chat_template.jinja"  # transformers' name: AutoTokenizer finds it there
OWN = "chat"  # the name that stands for the model's own template
SpecialTokens = tuple[tuple[str, str], ...]  # a tokenizer's, each with its name: ("eos_token", "</s>")
CLOSES_PROMPTS = '{{ eos_token if add_generation_prompt else "" }}'  # behind all else, where an encoder reads prompts
RENDERING_SECONDS = 10.0  # of computing, for one prompt
STAND_IN = re.compile("CHATRLHF([0-9]{6})TEXT")


class Piece(NamedTuple):
    """A stretch of a rendered prompt."""

    text: str
    is_data: bool  # it comes from the data, where a special token's text is but text
    is_reply: bool  # it belongs to an earlier reply: its text, and the EOS token behind it


@dataclass(frozen=True)
class Template:
    """A Jinja chat template.

    It is given what transformers gives: ``messages`` of ``role`` and ``content`` (a system text is the first of
    them), ``add_generation_prompt`` and the tokenizer's special tokens; also ``narrative``, ``reply_name`` and each
    message's ``name``. Where it knows no ``narrative``, that becomes part of the system text.
    """

    source: str

    def pieces(self, prompt: Prompt, special_tokens: SpecialTokens) -> list[Piece]:
        """The prompt up to where its reply begins.

        Raises:
            DataError: the template cannot show this prompt.
        """
        data = _Data()
        frames = self._frames(data.arguments(prompt, "narrative" in self.source), special_tokens, True)
        turns = [i for i, role in enumerate(data.roles) if role is not None]
        if [part for part in frames if isinstance(part, int) and part in turns] != turns:
            raise DataError(f"the template leaves out or repeats a part of the prompt {_short(prompt)}; choose another")
        lead, _ = self.around_reply(special_tokens)
        eos = dict(special_tokens).get("eos_token", "")
        replies = [isinstance(part, int) and data.roles[part] == "assistant" for part in frames]
        pieces: list[Piece] = []
        for part, is_reply, before, after in zip(
            frames, replies, [False, *replies], [*replies[1:], False], strict=False
        ):
            if isinstance(part, int):
                pieces.append(Piece(data.texts[part], True, is_reply))
                continue
            if before and eos and eos in part:
                closing, _, part = part.partition(eos)
                pieces.append(Piece(closing + eos, False, True))
            cut = len(part) - len(lead) if after and part.endswith(lead) else len(part)
            pieces += [Piece(part[:cut], False, False), Piece(part[cut:], False, True)]
        return [piece for piece in pieces if piece.text]

    @lru_cache(maxsize=64)  # noqa: B019 (a template is a few lines of text)
    def around_reply(self, special_tokens: SpecialTokens) -> tuple[str, str]:
        """What a reply's text begins with (the blank behind "Assistant:"), and what stands behind its last word.

        The former belongs to the reply because byte-pair tokenizers keep a blank with the word that follows.

        Raises:
            ConfigError: a reply does not begin as the prompt for one ends, so that what a model is trained to
                give is not what it would be asked for.
        """
        prompt = Prompt((Turn("user", "a", "A"),), reply_name="B")
        answered = Prompt((*prompt.turns, Turn("assistant", "b", "B")), reply_name="B")
        asked, _ = self._shown(prompt, special_tokens, True)
        whole, reply = self._shown(answered, special_tokens, False)
        last = next((place for place in STAND_IN.finditer(whole) if int(place[1]) == reply), None)
        if last is None:
            raise ConfigError("the template does not show the reply of a turn; choose another")
        opening, closing = whole[: last.start()], whole[last.end() :]
        if not opening.startswith(asked):
            opens, asks = (STAND_IN.split(text)[-1] for text in (opening, asked))
            raise ConfigError(
                f"the template opens a reply with {opens!r} and asks for one with {asks!r}; a reply has to begin with "
                "what add_generation_prompt adds"
            )
        return opening[len(asked) :], closing

    def _shown(self, prompt: Prompt, special_tokens: SpecialTokens, opens_reply: bool) -> tuple[str, int]:
        """A prompt with its stand-ins, and the number of that for its last turn's text."""
        data = _Data()
        frames = self._frames(data.arguments(prompt, "narrative" in self.source), special_tokens, opens_reply)
        shown = "".join(f"CHATRLHF{part:06d}TEXT" if isinstance(part, int) else part for part in frames)
        return shown, len(data.texts) - 1

    def _frames(
        self, arguments: dict[str, Any], special_tokens: SpecialTokens, opens_reply: bool
    ) -> tuple[str | int, ...]:
        key = json.dumps(arguments, sort_keys=True)
        return _frames(self.source, key, special_tokens, opens_reply)

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights, where transformers looks for a tokenizer's chat template."""
        (folder / FILE_NAME).write_text(self.source, encoding="utf-8")

    def closing_prompts(self) -> Template:
        """The same, with an EOS token behind a prompt, for whoever renders it without this package."""
        return Template(self.source.removesuffix("\n") + CLOSES_PROMPTS)

    @staticmethod
    def load(folder: Path) -> Template | None:
        """The template saved beside a model's weights, if there is one; what `closing_prompts` added is left out."""
        path = folder / FILE_NAME
        return Template(path.read_text(encoding="utf-8").removesuffix(CLOSES_PROMPTS)) if path.exists() else None


class _Data:
    """The texts of a prompt, each with a number, and a template's arguments with stand-ins in their place."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.roles: list[str | None] = []  # of messages; None for what a template may leave out or say twice
        self._names: dict[str, str] = {}

    def arguments(self, prompt: Prompt, takes_narrative: bool) -> dict[str, Any]:
        # In the order in which a template shows them.
        narrative = self._hold(prompt.narrative, "narrative") if prompt.narrative and takes_narrative else None
        system = [prompt.system, None if takes_narrative else prompt.narrative]
        system_text = "\n\n".join(part for part in system if part)
        messages = [{"role": "system", "content": self._hold(system_text, "system")}] if system_text else []
        for turn in prompt.turns:
            name = {"name": self._name(turn.name)} if turn.name else {}
            messages.append({"role": turn.role, "content": self._hold(turn.text, turn.role), **name})
        arguments: dict[str, Any] = {"messages": messages}
        if narrative:
            arguments["narrative"] = narrative
        if prompt.reply_name:
            arguments["reply_name"] = self._name(prompt.reply_name)
        return arguments

    def _hold(self, text: str, role: str | None) -> str:
        if not text:
            return text  # a template may look whether there is any
        self.texts.append(text)
        self.roles.append(role)
        return f"CHATRLHF{len(self.texts) - 1:06d}TEXT"

    def _name(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = self._hold(name, None)
        return self._names[name]


@lru_cache(maxsize=4096)
def _frames(source: str, arguments: str, special_tokens: SpecialTokens, opens_reply: bool) -> tuple[str | int, ...]:
    """A rendering: the template's own text, and between it the number of each text that stands there.

    It depends on the shape of a prompt alone, not on its words, so that few are made for a whole dataset.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    values = json.loads(arguments)
    try:
        with cpu_limit(RENDERING_SECONDS):
            rendered, _ = render_jinja_template(
                [values.pop("messages")],
                chat_template=source,
                add_generation_prompt=opens_reply,
                **values,
                **dict(special_tokens),
            )
    except Exception as error:  # a template may do all that Python can fail at
        reason = str(error) or type(error).__name__
        raise DataError(f"the template cannot show a prompt of this shape ({reason}); choose another") from None
    parts = STAND_IN.split(rendered[0])
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts) if i % 2 or part)


def _short(prompt: Prompt) -> str:
    text = prompt.text
    return repr(text if len(text) <= 40 else text[:37] + "...")


FORMATS = {
    path.stem: Template(path.read_text(encoding="utf-8"))
    for path in sorted((Path(__file__).parent / "formats").glob("*.jinja"))
}


def get_template(
    name: str, key: str = "actor_config.template", tokenizer: Any = None, folder: Path | None = None
) -> Template:
    """A template by name, from a Jinja file, or made from a text that holds ``{user_input}`` once.

    Args:
        name: a key of `FORMATS`; ``chat``, the tokenizer's own; a path that ends with ``.jinja``; or a text.
        tokenizer: whose own template is meant.
        folder: where a path that is not absolute is looked for first, before the working directory.

    Raises:
        ConfigError: it is none of them; the known names are listed.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name == OWN:
        if not isinstance(getattr(tokenizer, "chat_template", None), str):
            raise ConfigError(f"{key}: the model's tokenizer brings no chat template; choose one of {_known()}")
        return Template(tokenizer.chat_template)
    if name.endswith(".jinja"):
        with doing(f"{key}: reading", name, untrusted=True):
            places = [base / Path(name).expanduser() for base in (folder, Path.cwd()) if base is not None]
            for place in places:
                if place.is_file():
                    return Template(place.read_text(encoding="utf-8"))
        raise ConfigError(f"{key}: there is no file {' or '.join(map(str, dict.fromkeys(places)))}; correct the path")
    if name.count(PLACEHOLDER) == 1:
        return _from_text(*name.split(PLACEHOLDER))
    raise ConfigError(
        f"{key}: {name!r} is none of {_known()}, no path of a .jinja file and no text that holds {PLACEHOLDER} once"
    )


def _known() -> str:
    return ", ".join([OWN, *FORMATS])


def _from_text(before: str, after: str) -> Template:
    """What stands before and behind a user's turn; a reply follows directly."""
    opening, closing = (json.dumps(text, ensure_ascii=False) for text in (before, after))
    return Template(
        "{%- for message in messages -%}"
        '{%- if message.role == "assistant" -%}{{- message.content + eos_token -}}'
        f'{{%- elif message.role == "user" -%}}{{{{- {opening} + message.content + {closing} -}}}}'
        '{%- else -%}{{- message.content + "\\n\\n" -}}{%- endif -%}'
        "{%- endfor -%}"
    )
