"""Texts are put into templates as they are; a template file is text and nothing else."""

import json

import pytest

from chatrlhf.errors import ConfigError
from chatrlhf.runtime.bundled_files import artifacts_root
from chatrlhf.tools.synth.instructions import APPENDED, DEFAULTS, fill, read_templates

AWKWARD = [
    "{completion}",
    "{user_input}",
    "{0.__class__}",
    "{user_input.__class__}",
    "{{user_input}}",
    "{% for x in y %}{{ x }}{% endfor %}",
    "\\1 \\g<0> %s {} { }",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_a_text_is_inserted_literally(text):
    filled = fill("in: {user_input}|out: {completion}|{other} {{", {"user_input": text, "completion": text})
    assert filled == f"in: {text}|out: {text}|{{other}} {{{{"


def test_a_place_may_stand_twice():
    assert fill("{user_input}, {user_input}", {"user_input": "{user_input}"}) == "{user_input}, {user_input}"


def test_the_file_at_the_top_says_what_the_package_does():
    assert json.loads((artifacts_root() / "templates.json").read_text(encoding="utf-8")) == DEFAULTS


def test_rules_alone_get_prompt_and_completion_behind_them(tmp_path):
    path = tmp_path / "templates.json"
    path.write_text(json.dumps({"reward": "Here are the rules:\n\n1.Rule 1\n\n2. Rule 2"}))
    template = read_templates(path)["reward"]
    assert template == "Here are the rules:\n\n1.Rule 1\n\n2. Rule 2" + APPENDED["reward"]
    filled = fill(template, {"user_input": "a question", "completion": "an answer"})
    assert "Request:\na question\n\nReply:\nan answer" in filled
    assert read_templates(path)["rlhf"] == DEFAULTS["rlhf"]


def test_a_template_with_its_places_stays_as_it_is(tmp_path):
    path = tmp_path / "templates.json"
    path.write_text(json.dumps({"reward": "{user_input} -> {completion} ?", "unknown": 7}))
    assert read_templates(path)["reward"] == "{user_input} -> {completion} ?"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"reward": "judge {user_input}"}), "'reward' holds {user_input} and not {completion}"),
        (json.dumps({"pairs": "{completion_a} {user_input}"}), "not {completion_b}"),
        (json.dumps({"reward": ["a"]}), "'reward' is no text"),
        (json.dumps(["a"]), "expected an object"),
        ("{'reward': 'a'}", "line 1: cannot be read as JSON"),
    ],
)
def test_a_template_file_that_cannot_be_used(tmp_path, text, message):
    path = tmp_path / "templates.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_templates(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_templates(tmp_path / "missing.json")
