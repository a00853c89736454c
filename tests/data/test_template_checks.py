"""Checks of a template: transformers' ids, one BOS, one EOS, tokens for what the data say."""

from __future__ import annotations

import id_for_id
import pytest
from tiny import tokenizer

from chatrlhf.conversation import Prompt, Turn
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.stage_rows import Demonstration
from chatrlhf.data.template_checks import check_bos, check_eos, check_template_ids, check_unknown
from chatrlhf.data.templates import FORMATS, Template

PROMPTS = [Prompt.of("the cat"), Prompt((Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))]
ROWS = [Demonstration(PROMPTS[0], "the hat"), Demonstration(PROMPTS[1], "on the mat")]
SHOWN = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}REPLY{%- else -%}{{ m.content }}{%- endif -%}"
    "{%- endfor -%}"
)


def encoder(source: str = "", made=None, kind: type[Encoder] = Encoder) -> Encoder:
    return kind.of(made or tokenizer(), Template(source) if source else FORMATS["chatllama"], 64)


class Forgetful(Encoder):
    """Loses the last token of a prompt."""

    def prompt(self, prompt):
        return super().prompt(prompt)[:-1]


def test_ids_are_those_of_transformers():
    result = check_template_ids(encoder(), PROMPTS)
    assert result.status == "pass" and result.measured == "2 of 2 prompts have the ids of apply_chat_template"


def test_other_ids_are_told_with_the_row():
    prompts = [PROMPTS[1], Prompt(PROMPTS[0].turns, place="rows.json, row 7")]
    result = check_template_ids(encoder(kind=Forgetful), prompts[1:])
    assert result.status == "fail" and "rows.json, row 7" in result.measured and result.remedy


def test_prompts_that_quote_special_tokens_are_left_out():
    quoting = Prompt.of(f"say {tokenizer().eos_token}")
    result = check_template_ids(encoder(), [quoting])
    assert result.status == "pass" and result.measured.startswith("0 of 0")


@pytest.mark.parametrize(
    "opening, status", [("", "pass"), ("{{ bos_token }}{{ bos_token }}", "fail")], ids=["one", "two"]
)
def test_one_bos_opens_a_prompt(opening, status):
    made = id_for_id.tokenizer("Metaspace first")
    result = check_bos(encoder(opening + SHOWN.replace("REPLY", "{{ m.content + eos_token }}"), made), PROMPTS)
    assert result.status == status, result
    assert result.measured.startswith("2 of 2" if status == "pass" else "0 of 2")


def test_a_tokenizer_without_bos_needs_none():
    assert check_bos(encoder(), PROMPTS).measured == "the tokenizer has no BOS token"


@pytest.mark.parametrize(
    "reply, status",
    [("{{ m.content + eos_token }}", "pass"), ("{{ eos_token + m.content + eos_token }}", "fail")],
    ids=["at the end", "before it, too"],
)
def test_exactly_one_eos_is_trained(reply, status):
    result = check_eos(encoder(SHOWN.replace("REPLY", reply)), ROWS)
    assert result.status == status and bool(result.remedy) == (status == "fail")


def test_unknown_tokens_are_counted():
    made = id_for_id.tokenizer("WordPiece")
    assert check_unknown("tokenizer", made, ["hello river"]).status == "pass"
    result = check_unknown("tokenizer", made, ["日本語 日本語"])
    assert result.status == "warn" and result.remedy, result
