"""What models are told: ChatLLaMA's `templates.json`, a user's or the default, and how texts are put into it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from chatrlhf.config.strict_json import load_settings
from chatrlhf.errors import ConfigError

USER_INPUT, COMPLETION = "user_input", "completion"
DEFAULTS = {
    "actor": (
        "Write a conversation between a person and a helpful assistant. The person asks about something from everyday "
        "life, from work or from study, and asks back where an answer leaves something open. The assistant answers in "
        "two to five sentences, gives the reason behind a recommendation, and says openly what it does not know."
    ),
    "reward": (
        "You judge how good the reply of an assistant is, with a number from 0 to 5, where 0 is useless and 5 is "
        "excellent. Rules:\n"
        "1. The reply must answer what was asked; a correct reply to another question is worth at most 1.\n"
        "2. Statements must be true. One wrong statement costs at least two points.\n"
        "3. A short reply that is complete is better than a long one that repeats itself.\n"
        "4. A polite refusal is worth 3 where the request would do harm, and 0 where it would not.\n\n"
        "Request:\n{user_input}\n\nReply:\n{completion}\n\nAnswer with the number only.\nScore:"
    ),
    "rlhf": (
        "Here are requests that people made to an assistant. Write one more: on another subject, in your own words, "
        "about as long as these, and clear enough to be answered without asking back. Write the request only."
    ),
    "pairs": (
        "Two replies of an assistant to the same request. Which is better: the one that answers what was asked, is "
        "true, and is no longer than it has to be?\n\n"
        "Request:\n{user_input}\n\nReply A:\n{completion_a}\n\nReply B:\n{completion_b}\n\n"
        "Answer with the letter only, A or B.\nBetter:"
    ),
}
APPENDED = {  # to a template that holds rules only, as the README of ChatLLaMA has it
    "reward": "\n\nRequest:\n{user_input}\n\nReply:\n{completion}\n\nAnswer with the number only.\nScore:",
    "pairs": (
        "\n\nRequest:\n{user_input}\n\nReply A:\n{completion_a}\n\nReply B:\n{completion_b}\n\n"
        "Answer with the letter of the better reply only, A or B.\nBetter:"
    ),
}
PLACES = {
    "reward": (USER_INPUT, COMPLETION),
    "pairs": (USER_INPUT, f"{COMPLETION}_a", f"{COMPLETION}_b"),
}


def read_templates(path: Path | None) -> dict[str, str]:
    """The templates of a file, and the defaults of those that it does not have.

    Raises:
        ConfigError: there is no such file, it is not a JSON object of texts, or a template takes one of the texts that
            it judges and not the other.
    """
    templates = dict(DEFAULTS)
    if path is not None:
        templates |= _read(path)
    for name, places in PLACES.items():
        held = [place for place in places if f"{{{place}}}" in templates[name]]
        if not held:
            templates[name] += APPENDED[name]
        elif len(held) < len(places):
            missing = ", ".join(f"{{{place}}}" for place in places if place not in held)
            raise ConfigError(
                f"{path}: template {name!r} holds {{{held[0]}}} and not {missing}; give all of them, or none, and they "
                "are appended"
            )
    return templates


def _read(path: Path) -> dict[str, str]:
    values = load_settings(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected an object of templates such as {', '.join(DEFAULTS)}")
    for name, text in values.items():
        if name in DEFAULTS and not isinstance(text, str):
            raise ConfigError(f"{path}: template {name!r} is no text, but {type(text).__name__}; write it as one")
    return {name: text for name, text in values.items() if name in DEFAULTS}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """A template with texts in their places, ``{user_input}`` and the like, each as it is.

    Nothing in a text is looked at again: braces, other places' names or a template's syntax in it stay text.
    """
    places = "|".join(map(re.escape, texts))
    return re.sub(rf"\{{({places})\}}", lambda place: texts[place[1]], template)
