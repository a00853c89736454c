"""Chat templates: where they come from, and what each makes of a conversation.

Every template is a Jinja chat template: one of the formats that published models were trained with (`formats/`), the
model's own, or a file of the user's. It is rendered by transformers, in its sandbox (a template cannot reach Python)
and within `render_limits.py`'s limits, with the conversation itself, so a template that trims, splits off thoughts or
looks at its content does here what it does in `apply_chat_template`. What is text of the data in a rendering and what
is the template's: `rendering.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.render_limits import refuse_long, render_limits
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.errors.boundary import doing

PLACEHOLDER = "{user_input}"
FILE_NAME = "chat_template.jinja"  # transformers' name: AutoTokenizer finds it there
OWN = "chat"  # the name that stands for the model's own template; one of several is "chat:NAME"
CLOSES_PROMPTS = '{{ eos_token if add_generation_prompt else "" }}'  # behind all else, where an encoder reads prompts
SpecialTokens = tuple[tuple[str, str], ...]  # a tokenizer's, each with its name: ("eos_token", "</s>")

# Transformers' function for the date, called with a format: `strftime_now("%d %b %Y")`.
DATE_CALL = re.compile(r"""strftime_now\(\s*("[^"\n]*"|'[^'\n]*')\s*\)""")
# Words that no template says itself, to find out where it shows what.
USER, REPLY, USER_NAME, REPLY_NAME = "Xq7-User", "Xq7-Reply", "Xq7-Name", "Xq7-Replier"


class ReplyFrame(NamedTuple):
    """What a template puts around a reply of plain words."""

    lead: str  # between what asks for a reply and its text: the blank behind "Assistant:", an empty thought
    closing: str  # behind its text, to the end
    asks: str  # the template's own text at the end of a prompt, behind the last text of the data
    opening: str  # from the start to the first user's text
    between: str  # from a reply to the next user's text; empty where the template shows no second turn


@dataclass(frozen=True)
class Template:
    """A Jinja chat template.

    It is given what transformers gives: ``messages`` of ``role`` and ``content`` (a system text is the first of
    them), ``add_generation_prompt`` and the tokenizer's special tokens; also ``narrative``, ``reply_name`` and each
    message's ``name``. Where it knows no ``narrative``, that becomes part of the system text.
    """

    source: str
    origin: str = field(default="the chat template", compare=False)  # for messages: key and value, or a file
    day: date | None = field(default=None, compare=False)  # that stands in it in place of the clock's

    def render(self, arguments: Mapping[str, Any], special_tokens: SpecialTokens, asks: bool) -> str:
        """The text of a conversation, as `apply_chat_template(..., tokenize=False)` gives it.

        Args:
            arguments: from `arguments_of`.
            asks: transformers' ``add_generation_prompt``.

        Raises:
            DataError: the template refuses the conversation, or fails; with the template's line.
            ConfigError: it is no valid Jinja.
        """
        return self._rendered(arguments, special_tokens, asks, False)[0]

    def marked_replies(self, arguments: Mapping[str, Any], special_tokens: SpecialTokens) -> list[tuple[int, int]]:
        """Where `{% generation %}` and `{% endgeneration %}` stand in a prompt, as (start, end) in characters."""
        return self._rendered(arguments, special_tokens, True, True)[1]

    @property
    def marks_replies(self) -> bool:
        """Whether it says by `{% generation %}` what an assistant wrote."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source) is not None

    def _rendered(
        self, arguments: Mapping[str, Any], special_tokens: SpecialTokens, asks: bool, marks: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        values = dict(special_tokens) | arguments
        try:
            with render_limits():
                rendered, spans = render_jinja_template(
                    [values.pop("messages")],
                    chat_template=self.source,
                    add_generation_prompt=asks,
                    return_assistant_tokens_mask=marks,
                    **values,
                )
            refuse_long(rendered[0], arguments)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{self.origin}, line {error.lineno}: it is not valid Jinja ({error.message}); correct it"
            ) from None
        except Exception as error:  # a template may do all that Python can fail at
            line, reason = _line_of(error), str(error) or type(error).__name__
            where = f"{self.origin}, line {line}" if line else self.origin
            raise DataError(
                f"{where}: the template cannot show this conversation ({reason}); change the row, or name another "
                "template (one of chatrlhf's, or a .jinja file)"
            ) from None
        return rendered[0], spans[0] if marks else []

    def frame(self, special_tokens: SpecialTokens) -> ReplyFrame:
        """What it puts around a reply of plain words behind one user's turn.

        Raises:
            ConfigError: it does not show a reply at all.
        """
        return _frames(self, special_tokens)

    @property
    def takes_narrative(self) -> bool:
        return "narrative" in self.source

    @property
    def asking_line(self) -> int:
        """The line of its last look at ``add_generation_prompt``; 1 where there is none."""
        lines = [number for number, line in enumerate(self.source.split("\n"), 1) if "add_generation_prompt" in line]
        return lines[-1] if lines else 1

    def with_arguments(self, arguments: Mapping[str, Any]) -> Template:
        """The same with other values where none are given: whoever renders it later gets them too."""
        given = "".join(
            f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}"
            for name, value in arguments.items()
        )
        return replace(self, source=given + self.source)

    def on(self, day: date) -> Template:
        """The same with this day's date in place of the clock's.

        Raises:
            ConfigError: it asks for the date by something other than a constant format.
        """
        fixed = DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[1][1:-1]), ensure_ascii=False), self.source)
        if "strftime_now(" in fixed:
            raise ConfigError(
                f"{self.origin}: line {_line_with(fixed, 'strftime_now(')} asks for the date by a format that is "
                "computed, so prompts would change by the day; save the template as a .jinja file with a fixed date"
            )
        return replace(self, source=fixed, day=day if fixed != self.source else self.day)

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights, where transformers looks for a tokenizer's chat template."""
        (folder / FILE_NAME).write_text(self.source, encoding="utf-8")

    def closing_prompts(self) -> Template:
        """The same, with an EOS token behind a prompt, for whoever renders it without this package."""
        return replace(self, source=self.source.removesuffix("\n") + CLOSES_PROMPTS)

    @staticmethod
    def load(folder: Path) -> Template | None:
        """The template saved beside a model's weights, if there is one; what `closing_prompts` added is left out."""
        path = folder / FILE_NAME
        if not path.exists():
            return None
        return Template(path.read_text(encoding="utf-8").removesuffix(CLOSES_PROMPTS), str(path))


def arguments_of(prompt: Prompt, takes_narrative: bool, reply: str | None = None) -> dict[str, Any]:
    """What a template is given to show a prompt, or a prompt with its reply."""
    narrative = prompt.narrative if takes_narrative else None
    parts = [part for part in (prompt.system, None if takes_narrative else prompt.narrative) if part is not None]
    # An empty system text is one: templates then leave out the text that they have for conversations without any.
    messages = [{"role": "system", "content": "\n\n".join(filter(None, parts))}] if parts else []
    for turn in prompt.turns:
        messages.append({"role": turn.role, "content": turn.text, **({"name": turn.name} if turn.name else {})})
    name = {"name": prompt.reply_name} if prompt.reply_name else {}
    if reply is not None:
        messages.append({"role": "assistant", "content": reply, **name})
    arguments: dict[str, Any] = {"messages": messages}
    if narrative:
        arguments["narrative"] = narrative
    return arguments | ({"reply_name": prompt.reply_name} if prompt.reply_name else {})


@lru_cache(maxsize=64)
def _frames(template: Template, special_tokens: SpecialTokens) -> ReplyFrame:
    arguments = {"messages": [{"role": "user", "content": USER, "name": USER_NAME}], "reply_name": REPLY_NAME}
    asked = template.render(arguments, special_tokens, True)
    arguments["messages"].append({"role": "assistant", "content": REPLY, "name": REPLY_NAME})
    whole = template.render(arguments, special_tokens, False)
    before, shown, closing = whole.rpartition(REPLY)
    if not shown:
        raise ConfigError(f"{template.origin}: the template does not show the reply of a turn; choose another")
    lead = before[len(asked) :] if before.startswith(asked) else ""
    asks = re.split("|".join(map(re.escape, (USER, USER_NAME, REPLY_NAME))), asked)[-1]
    return ReplyFrame(lead, closing, asks, asked.partition(USER)[0], _between(template, special_tokens, arguments))


def _between(template: Template, special_tokens: SpecialTokens, arguments: dict[str, Any]) -> str:
    """What stands between a reply and the next user's text."""
    messages = [*arguments["messages"], {"role": "user", "content": USER, "name": USER_NAME}]
    try:
        shown = template.render(arguments | {"messages": messages}, special_tokens, True)
    except DataError:  # a template of one turn
        return ""
    return shown.partition(REPLY)[2].partition(USER)[0]


def _line_of(error: BaseException) -> int | None:
    """The line of a template that an error came from; Jinja writes its lines into tracebacks."""
    if getattr(error, "lineno", None):
        return int(error.lineno)
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _line_with(source: str, text: str) -> int:
    return source[: source.index(text)].count("\n") + 1


def _literal(value: Any) -> str:
    """A value as Jinja writes it."""
    names = {True: "true", False: "false", None: "none"}
    is_name = value is None or isinstance(value, bool)
    return names[value] if is_name else json.dumps(value, ensure_ascii=False)


FORMATS = {
    path.stem: Template(path.read_text(encoding="utf-8"), f"template {path.stem}")
    for path in sorted((Path(__file__).parent / "formats").glob("*.jinja"))
}


def get_template(
    name: str,
    key: str = "actor_config.template",
    tokenizer: Any = None,
    folder: Path | None = None,
    day: date | None = None,
) -> Template:
    """A template by name, from a Jinja file, or made from a text that holds ``{user_input}`` once.

    Args:
        name: a key of `FORMATS`; ``chat``, the tokenizer's own (``chat:NAME`` where it has several); a path that ends
            with ``.jinja``; or a text.
        tokenizer: whose own template is meant.
        folder: where a path that is not absolute is looked for first, before the working directory.
        day: the date that a template shows which asks for one; None: today.

    Raises:
        ConfigError: it is none of them; the known names are listed.
    """
    found, holder = _found(name, key, tokenizer, folder), getattr(tokenizer, "name_or_path", "")
    origin = f"{name} of {holder}" if is_own(name) and holder else name
    return replace(found, origin=f"{key} ({origin})").on(day or date.today())


def actor_template(config: Config, tokenizer: Any) -> Template:
    """The template of `actor_config`. Raises ConfigError as `get_template` does."""
    section = config.actor_config
    template = get_template(section.template, "actor_config.template", tokenizer, config.base_dir, config.day)
    return template.with_arguments(section.chat_template_kwargs)


def reward_template(config: Config, tokenizer: Any) -> Template:
    """The template of `reward_config`, or the actor's. Raises ConfigError as `get_template` does."""
    section = config.reward_config
    if section.template is None:
        return actor_template(config, tokenizer)
    template = get_template(section.template, "reward_config.template", tokenizer, config.base_dir, config.day)
    return template.with_arguments(section.chat_template_kwargs)


def _found(name: str, key: str, tokenizer: Any, folder: Path | None) -> Template:
    if name in FORMATS:
        return FORMATS[name]
    if is_own(name):
        return Template(_own(name.partition(":")[2], key, tokenizer))
    if name.endswith(".jinja"):
        with doing(f"{key}: reading", name, untrusted=True):
            paths = [base / Path(name).expanduser() for base in (folder, Path.cwd()) if base is not None]
            for path in paths:
                if path.is_file():
                    return Template(path.read_text(encoding="utf-8"))
        raise ConfigError(f"{key}: there is no file {' or '.join(map(str, dict.fromkeys(paths)))}; correct the path")
    if name.count(PLACEHOLDER) == 1:
        return _from_text(*name.split(PLACEHOLDER))
    raise ConfigError(
        f"{key}: {name!r} is none of {_known()}, no path of a .jinja file and no text that holds {PLACEHOLDER} once"
    )


def is_own(name: str) -> bool:
    """Whether a template's name stands for the model's own."""
    return name == OWN or name.startswith(f"{OWN}:")


def _own(wanted: str, key: str, tokenizer: Any) -> str:
    """The source of a tokenizer's template, of several the one that is wanted or the default one."""
    own = getattr(tokenizer, "chat_template", None)
    if not own:
        holder = getattr(tokenizer, "name_or_path", "") or "the model"
        raise ConfigError(f"{key}: the tokenizer of {holder} brings no chat template; choose one of {_known()}")
    templates = own if isinstance(own, dict) else {"default": own}
    source = templates.get(wanted or "default")
    if source is None:
        names = ", ".join(f"{OWN}:{name}" for name in sorted(templates))
        raise ConfigError(
            f"{key}: the model's tokenizer brings no template {wanted or 'default'!r}; choose one of {names}"
        )
    return source


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
