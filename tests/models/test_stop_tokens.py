"""Which ids end a reply, and which ids are no token at all."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import llama, tokenizer

from chatrlhf.errors import ConfigError
from chatrlhf.models.stop_tokens import ids_without_token, refuse_unknown_ids, stop_tokens, write_stop_tokens

CONTROL = ["<|eom|>", "<|eot|>", "<think>"]


@pytest.fixture(scope="module")
def words():
    """Control tokens behind the others; EOS is 0, pad 1."""
    made = tokenizer()
    made.add_special_tokens({"extra_special_tokens": CONTROL})
    return made


def named(words, of_generation_config, of_config=None, rows: int | None = None):
    model = llama(vocab=rows or len(words), eos_token_id=of_config)
    model.generation_config.eos_token_id = of_generation_config
    return model


def test_all_control_tokens_that_the_files_name_end_a_reply_the_trained_one_first(words):
    eom, eot, _ = words.convert_tokens_to_ids(CONTROL)
    assert stop_tokens(named(words, [eom, eot, 0]), words).ids == (0, eom, eot)
    assert stop_tokens(named(words, eot, of_config=[eom]), words).ids == (0, eot, eom)
    assert stop_tokens(named(words, None, of_config=eot), words).ids == (0, eot)
    assert stop_tokens(named(words, None), words).ids == (0,)
    assert stop_tokens(named(words, None), words, eom).ids == (0, eom)  # the tokenizer's own, before a template's
    assert stop_tokens(named(words, [1, 0]), words).ids == (0, 1)  # Qwen's pad token is an EOS, too


@pytest.mark.parametrize(
    "wrong, why",
    [
        (5000, "5000 (the model has the ids 0 to 272)"),
        (-1, "-1 (the model"),
        ("</s>", "'</s>' (the model"),
        ([7], "[7] (the model"),
        (50, "a reply may hold"),
        (272, "'<think>', which the template puts inside a reply"),
    ],
)
def test_ids_that_end_no_reply_are_left_out_with_the_reason(words, wrong, why):
    assert len(words) == 273
    found = stop_tokens(named(words, [wrong, wrong, 271]), words, inside={5, 272})
    assert found.ids == (0, 271) and len(found.left_out) == 1 and why in found.left_out[0]


def test_the_trained_eos_ends_a_reply_wherever_else_it_stands(words):
    assert stop_tokens(named(words, 0), words, inside={0}).ids == (0,)


def test_what_is_written_is_what_is_read(words):
    model = named(words, 50)
    write_stop_tokens(model, (0, 271))
    assert model.generation_config.eos_token_id == [0, 271] and model.config.eos_token_id == 0
    write_stop_tokens(model, (271,))
    assert model.generation_config.eos_token_id == 271
    assert stop_tokens(model, words).ids == (0, 271)


def test_ids_without_a_token_are_the_padding_of_the_head_and_holes():
    vocabulary = {"a": 0, "b": 2, "c": 5}
    holes = SimpleNamespace(get_vocab=lambda: vocabulary, added_tokens_decoder={3: "<s>", 9: "<beyond>"})
    assert ids_without_token(holes, 8) == (1, 4, 6, 7)
    words = tokenizer()
    assert ids_without_token(words, len(words)) == () and ids_without_token(words, len(words) + 2) == (270, 271)


def test_ids_that_gen_kwargs_names_have_to_be_the_models():
    gen = SimpleNamespace(eos_token_id=None, forbidden_tokens=[])
    refuse_unknown_ids(gen, 10)
    for key, value in (("eos_token_id", 10), ("eos_token_id", [3, -1]), ("forbidden_tokens", [2, 11])):
        with pytest.raises(ConfigError, match=rf"gen_kwargs.{key}: the model has the ids 0 to 9, got"):
            refuse_unknown_ids(SimpleNamespace(**vars(gen) | {key: value}), 10)
