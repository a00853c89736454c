"""Nonsense in every key of the configuration is refused in one line that names the key."""

import sys
from pathlib import Path

from chatrlhf.config import load_config
from chatrlhf.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "field"))

from odd_values import FOR_ALL, FOR_KINDS, SENSIBLE, keys, odd_values  # noqa: E402


def answer(key: str, value: object) -> str:
    """What is said about a value; an empty text where it is taken."""
    *sections, name = key.split(".")
    tree = {name: value}
    for section in reversed(sections):
        tree = {section: tree}
    try:
        load_config(tree)
    except ConfigError as error:
        return str(error)
    return ""


def test_every_key_refuses_nonsense_by_its_name():
    wrong = {}
    for key, kind, value in odd_values():
        said = answer(key, value)
        if key not in said or "\n" in said or len(said) > 1000:
            wrong[key, kind] = said
    assert wrong == {}


def test_what_is_called_sensible_is_taken():
    all_values = FOR_ALL | FOR_KINDS[int] | FOR_KINDS[float]
    for key, _ in keys():
        for (name, kind), reason in SENSIBLE.items():
            if key.rpartition(".")[2] == name:
                assert answer(key, all_values[kind]) == "", reason
