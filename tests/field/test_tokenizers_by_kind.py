"""Kinds of tokenizers: what their files say of special tokens, padding and the ends of a text changes no id.

Prompts are `apply_chat_template`'s of the finished folder, lengths are those of the ids, a row ends with one EOS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from id_for_id import CHATML, ZEPHYR, dialogues, messages_of, tokenizer
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import get_template


def flagged(**flags: bool) -> Callable[[dict[str, Any]], None]:
    def edit(stored: dict[str, Any]) -> None:
        for token in stored["added_tokens"]:
            if token["special"]:
                token |= flags

    return edit


def truncating(stored: dict[str, Any]) -> None:
    stored["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    side = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0, "pad_token": "<pad>"}
    stored["padding"] = {"strategy": {"Fixed": 64}} | side


def closing(opens: bool) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        backend, bos = made.backend_tokenizer, "<s> " if opens else ""
        named = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        pair = f"{bos}$A </s> $B </s>"
        backend.post_processor = processors.TemplateProcessing(f"{bos}$A </s>", pair, named[not opens :])

    return change


def added(made: Any) -> None:
    words = [AddedToken("river", lstrip=True, normalized=False), AddedToken("hello", single_word=True)]
    made.add_tokens([*words, AddedToken("  ", normalized=False)])


def backend(**parts: Any) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        for name, part in parts.items():
            setattr(made.backend_tokenizer, name, part)

    return change


def attributes(**values: Any) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        for name, value in values.items():
            setattr(made, name, value)

    return change


STORED = {
    "special tokens are normalized": flagged(normalized=True),
    "special tokens take the blanks behind them": flagged(rstrip=True),
    "special tokens take the blanks before them": flagged(lstrip=True),
    "special tokens are single words": flagged(single_word=True),
    "truncation and padding in the file": truncating,
}
CHANGED = {
    "EOS behind every text": closing(False),
    "BOS and EOS around every text": closing(True),
    "added words": added,
    "lower case": backend(normalizer=normalizers.Lowercase()),
    "a blank before every text": backend(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "no pad token": attributes(pad_token=None),
    "the pad token is EOS": attributes(pad_token="</s>"),
    "the pad token is unknown": attributes(pad_token="<unk>"),
    "a model of eight tokens": attributes(model_max_length=8),
    "blanks are cleaned up": attributes(clean_up_tokenization_spaces=True),
}
OF_BYTES = ("lower case", "a blank before every text")


def made(base: str, kind: str) -> Any:
    own = tokenizer(base)
    if kind in CHANGED:
        CHANGED[kind](own)
        return own
    stored = json.loads(own.backend_tokenizer.to_str())
    STORED[kind](stored)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(stored)), **names)


def check(own: Any, template: str, folder: Any) -> None:
    own.chat_template = template
    encoder = Encoder.of(own, get_template("chat", tokenizer=own), 10**6)
    encoder.save(folder)
    left = AutoTokenizer.from_pretrained(folder)
    for prompt, reply in dialogues(8, seed=3):
        asked = encoder.prompt(prompt)
        assert asked == left.apply_chat_template(messages_of(prompt), add_generation_prompt=True, return_dict=False)
        ids, _ = encoder.labelled(prompt, reply, "completion")
        assert ids[: len(asked)] == asked and ids[-1] == own.eos_token_id
        assert encoder.prompt_lengths([prompt]) == [len(asked)]
        assert encoder.completion_lengths([(prompt, reply)]) == [len(ids) - len(asked)]


@pytest.mark.parametrize("template", [CHATML, ZEPHYR], ids=["chatml", "zephyr"])
@pytest.mark.parametrize("base", ["byte-level", "Metaspace first", "Prepend"])
@pytest.mark.parametrize("kind", [*STORED, *CHANGED])
def test_a_kind_of_tokenizer(kind, base, template, tmp_path):
    if kind in OF_BYTES and base != "byte-level":
        pytest.skip("of byte-level tokenizers alone")
    check(made(base, kind), template, tmp_path)


def test_a_tokenizer_written_in_python(tmp_path):
    own = ByT5Tokenizer(bos_token="<s>")
    own.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    check(own, CHATML, tmp_path)
