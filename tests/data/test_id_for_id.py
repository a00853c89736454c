"""What is sent to a model is what `apply_chat_template` of the finished folder gives, id for id.

Whole rows too where a special token stands before the reply; elsewhere the tokens at that border may be others.
"""

from __future__ import annotations

import pytest
from id_for_id import MAKERS, SHIPPED, WRITTEN, dialogues, messages_of, public_template, tokenizer
from transformers import AutoTokenizer

from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS, get_template
from chatrlhf.errors import DataError

AT_THE_BORDER = 6  # tokens
# Which rows a template can be trained on is its own decision, and known here.
REFUSES_SYSTEM = {"gemma"}
OPENS_A_THOUGHT = {"deepseek_r1_distill", "deepseekv3", "nemotron_3_nano"}
FEW = [("qwen3", "byte-level"), ("llama2", "Metaspace first"), ("hh", "Prepend"), ("gemma", "Unigram")]
ALL = [(name, kind) for name in (*WRITTEN, *SHIPPED, *FORMATS) for kind in MAKERS]


def made(name: str, kind: str) -> Encoder:
    own = tokenizer(kind)
    if name not in FORMATS:
        own.chat_template = public_template(name)
        if own.chat_template is None:
            pytest.skip(f"this release of trl ships no template {name}")
    return Encoder.of(own, get_template(name if name in FORMATS else "chat", tokenizer=own), 10**6)


def check(name: str, kind: str, count: int, folder) -> None:
    encoder = made(name, kind)
    encoder.save(folder)
    left = AutoTokenizer.from_pretrained(folder)

    def theirs(*said, **options):
        return left.apply_chat_template(messages_of(*said), tokenize=True, return_dict=False, **options)

    refused = 0
    for prompt, reply in dialogues(count):
        if prompt.system is not None and name in REFUSES_SYSTEM:
            with pytest.raises(DataError, match="System role not supported"):
                encoder.prompt(prompt)
            continue
        asked = encoder.prompt(prompt)
        assert asked == theirs(prompt, add_generation_prompt=True)
        try:
            ids, _ = encoder.labelled(prompt, reply, "completion")
        except DataError as error:
            assert name in OPENS_A_THOUGHT and "asks for a reply by" in str(error)
            refused += 1
            continue
        assert ids[: len(asked)] == asked and ids[-1] == encoder.tokenizer.eos_token_id
        whole, own = theirs(prompt, reply), ids[:-1]
        if encoder._asks == "" and encoder.chat_template.frame(encoder._renderer.special_tokens).asks:
            assert whole[: len(own)] == own
        elif whole[: len(own)] != own:
            rest = own[len(asked) + AT_THE_BORDER :]
            assert any(whole[i : i + len(rest)] == rest for i in range(len(whole))), (own, whole)
        assert encoder.prompt_lengths([prompt]) == [len(asked)]
        assert encoder.completion_lengths([(prompt, reply)]) == [len(ids) - len(asked)]
        assert encoder.judged(prompt, reply) == ids and encoder.judged(prompt, reply, finished=False) == own
    assert (refused > 0) == (name in OPENS_A_THOUGHT)


@pytest.mark.parametrize(("name", "kind"), FEW)
def test_a_few_dialogues(name, kind, tmp_path):
    check(name, kind, 20, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in ALL))
def test_every_template_by_every_kind_of_tokenizer(name, tmp_path):
    for kind in MAKERS:
        check(name, kind, 20, tmp_path / kind)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(("name", "kind"), ALL)
def test_500_dialogues(name, kind, tmp_path):
    check(name, kind, 500, tmp_path)
