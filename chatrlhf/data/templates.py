"""How a user's text becomes the prompt a model sees.

A template is what stands before and behind the user's text, and what a completion starts with. Prompt and
completion stay separate segments: they are tokenised one by one and joined as ids, in SFT, reward, rollouts
and evaluation alike, so that no token ever straddles the border.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from chatrlhf.errors import ConfigError

PLACEHOLDER = "{user_input}"
FILE_NAME = "prompt_template.json"


@dataclass(frozen=True)
class Template:
    """A prompt is ``before + user_input + after``; a completion ``lead + completion``.

    ``lead`` is the blank behind "Assistant:". It belongs to the completion because byte-pair tokenizers keep a
    blank with the word that follows.
    """

    before: str = ""
    after: str = ""
    lead: str = ""
    turn_start: str | None = None  # how an earlier human turn opens inside user_input
    reply_start: str | None = None  # how an earlier assistant turn opens inside user_input

    def prompt(self, user_input: str) -> str:
        """The text a model is given."""
        # Joined, not formatted: braces in a user's text mean nothing.
        return self.before + user_input + self.after

    def completion(self, text: str) -> str:
        """The text a model is trained to give."""
        return self.lead + text

    def strip(self, generated: str) -> str:
        """The completion in text that a model gave, without its lead."""
        return generated.removeprefix(self.lead) if self.lead else generated

    def segments(self, user_input: str) -> list[tuple[str, bool]]:
        """The prompt cut into (text, is it an earlier assistant reply), for ``loss_on: all_turns``."""
        prompt = self.prompt(user_input)
        if self.turn_start is None or self.reply_start is None:
            return [(prompt, False)]
        segments: list[tuple[str, bool]] = []
        rest = prompt
        # The last reply_start opens the completion itself; those before it open earlier replies.
        while (start := rest.find(self.reply_start)) >= 0:
            cut = start + len(self.reply_start)
            end = rest.find(self.turn_start, cut)
            if end < 0:
                break
            segments += [(rest[:cut], False), (rest[cut:end], True)]
            rest = rest[end:]
        return [*segments, (rest, False)]

    def save(self, folder: Path) -> None:
        """Write it beside a model's weights."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> Template | None:
        """The template saved beside a model's weights, if there is one."""
        path = folder / FILE_NAME
        return Template(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


_HH = Template(
    before="\n\nHuman: ",
    after="\n\nAssistant:",
    lead=" ",
    turn_start="\n\nHuman:",
    reply_start="\n\nAssistant:",
)

TEMPLATES: dict[str, Template] = {
    "raw": Template(),
    "chatllama": Template(before="Human: ", after="\n\n##\n\nAssistant:", lead=" "),
    "hh": _HH,
    "stable_vicuna": Template(before="### Human: ", after="\n### Assistant:", lead=" "),
}


def get_template(name: str, key: str = "actor_config.template") -> Template:
    """A template by name, or made from a text that holds ``{user_input}`` once.

    Raises:
        ConfigError: neither; the known names are listed.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name.count(PLACEHOLDER) == 1:
        before, after = name.split(PLACEHOLDER)
        return Template(before=before, after=after)
    raise ConfigError(
        f"{key}: {name!r} is neither one of {', '.join(sorted(TEMPLATES))} nor a text that holds {PLACEHOLDER} once"
    )
