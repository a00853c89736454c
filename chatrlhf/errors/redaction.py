"""Redaction of credentials in all that is printed, logged or recorded: passwords in URLs, keys of the environment.

`UserError` redacts what it says when it is made; whatever else leaves the process passes through here where it leaves.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any

HIDDEN = "***"
SHORTEST = 8  # characters of a value that counts as a key: shorter ones stand in other words
# To the last "@" before the path (RFC 3986, section 3.2.1); pathlib makes one slash of two.
USER_INFO = re.compile(r"\b([a-z][a-z0-9+.-]+://?)[^\s/?#'\"<>]+@", re.I)
QUERY = re.compile(
    r"([?&](?:[\w.-]*[_.-])?(?:api_?key|key|token|secret|password|passwd|pwd|sig|signature|auth)=)[^&\s#'\"<>]+", re.I
)
KEY_NAMES = re.compile(r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)


def redacted(text: str) -> str:
    """A text without credentials.

    Hidden are user and password of URLs, parameters of URLs that are named as keys are (``?token=``), and the values of
    environment variables that are named so (``OPENAI_API_KEY``, ``HF_TOKEN``, ...).
    """
    return _hidden(text, _environment_keys())


def redacted_tree(value: Any) -> Any:
    """Dictionaries and lists, as JSON has them, with every text redacted."""
    return _tree(value, _environment_keys())  # which is asked once: it takes longer than a text


def _tree(value: Any, keys: tuple[str, ...]) -> Any:
    if isinstance(value, str):
        return _hidden(value, keys)
    if isinstance(value, dict):
        return {_tree(key, keys): _tree(each, keys) for key, each in value.items()}
    return [_tree(each, keys) for each in value] if isinstance(value, (list, tuple)) else value


def _hidden(text: str, keys: tuple[str, ...]) -> str:
    if ":/" in text:
        text = QUERY.sub(rf"\g<1>{HIDDEN}", USER_INFO.sub(rf"\g<1>{HIDDEN}@", text))
    return _any_of(keys).sub(HIDDEN, text) if keys else text


def _environment_keys() -> tuple[str, ...]:
    named = (value.strip() for name, value in os.environ.items() if KEY_NAMES.search(name))
    return tuple(sorted({value for value in named if len(value) >= SHORTEST}, key=len, reverse=True))


@lru_cache(maxsize=8)
def _any_of(keys: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, keys)))
