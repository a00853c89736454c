"""Templates: what a model is given, what it is trained to give, and where earlier turns stand."""

import json

import pytest

from chatrlhf.data.templates import TEMPLATES, Template, get_template
from chatrlhf.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "prompt", "completion"),
    [
        ("raw", "Hi?", "Hello."),
        ("chatllama", "Human: Hi?\n\n##\n\nAssistant:", " Hello."),
        ("hh", "\n\nHuman: Hi?\n\nAssistant:", " Hello."),
        ("stable_vicuna", "### Human: Hi?\n### Assistant:", " Hello."),
    ],
)
def test_built_in_templates(name, prompt, completion):
    template = get_template(name)
    assert template.prompt("Hi?") == prompt
    assert template.completion("Hello.") == completion
    assert template.strip(completion) == "Hello."


def test_only_the_lead_is_stripped():
    generated = "  two blanks "
    assert get_template("hh").strip(generated) == " two blanks "
    assert get_template("raw").strip(generated) == generated


@pytest.mark.parametrize("name", [*TEMPLATES, "Q: {user_input}\nA:"])
@pytest.mark.parametrize("text", ["{user_input}", "{", "}} {0} {name!r}", "100 % of {a: 1}", "%s \\n $x"])
def test_braces_in_a_users_text_are_text(name, text):
    template = get_template(name)
    assert template.prompt(text) == template.before + text + template.after
    assert template.completion(text).endswith(text)
    assert "".join(piece for piece, _ in template.segments(text)) == template.prompt(text)


def test_a_template_written_out():
    template = get_template("Question: {user_input}\nAnswer:")
    assert template.prompt("why?") == "Question: why?\nAnswer:"
    assert template.completion("so") == "so"


@pytest.mark.parametrize("name", ["alpaca", "{user_input} {user_input}", "", "{prompt}"])
def test_an_unknown_template_names_the_key_and_the_known_ones(name):
    with pytest.raises(ConfigError, match="reward_config.template.*chatllama, hh, raw, stable_vicuna"):
        get_template(name, "reward_config.template")


def test_earlier_turns_of_a_transcript():
    segments = get_template("hh").segments(
        "One?\n\nAssistant: Two.\n\nHuman: Three?\n\nAssistant: Four.\n\nHuman: Five?"
    )
    assert segments == [
        ("\n\nHuman: One?\n\nAssistant:", False),
        (" Two.", True),
        ("\n\nHuman: Three?\n\nAssistant:", False),
        (" Four.", True),
        ("\n\nHuman: Five?\n\nAssistant:", False),
    ]


@pytest.mark.parametrize("text", ["One?", "ends with a reply\n\nAssistant: Two.", "\n\nHuman: twice", "\n\nAssistant:"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_segments_join_to_the_prompt(name, text):
    template = get_template(name)
    segments = template.segments(text)
    assert "".join(piece for piece, _ in segments) == template.prompt(text)
    # What opens the completion is never an earlier reply.
    assert not segments[-1][1]


def test_it_travels_with_the_weights(tmp_path):
    assert Template.load(tmp_path) is None
    for template in [*TEMPLATES.values(), Template("«", "»", "é")]:
        template.save(tmp_path)
        assert Template.load(tmp_path) == template
    assert json.loads((tmp_path / "prompt_template.json").read_text(encoding="utf-8"))["before"] == "«"
