"""When two tokenizers are one, and that any text can be written with a trained one."""

import json

from tiny import tokenizer

from chatrlhf.models.loading.tokenizer import load_tokenizer, same_tokenizer


def test_a_tokenizer_is_the_same_after_saving_and_whatever_it_padded_last(tmp_path):
    made = tokenizer()
    made.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), "actor_config.model")
    loaded(["the cat", "sat on the mat"], padding=True, truncation=True, max_length=3)
    assert same_tokenizer(made, loaded)


def test_another_vocabulary_is_another_tokenizer():
    assert not same_tokenizer(tokenizer(270), tokenizer(262))


def test_other_merges_of_the_same_vocabulary_are_another_tokenizer():
    # Equal tokens, but the merge rules in another order: the ids of a text may differ.
    first, second = tokenizer(), tokenizer()
    rules = json.loads(second.backend_tokenizer.to_str())
    rules["model"]["merges"].reverse()
    second._tokenizer = second.backend_tokenizer.from_str(json.dumps(rules))
    assert first.get_vocab() == second.get_vocab()
    assert not same_tokenizer(first, second)


def test_every_text_can_be_written_and_read_back():
    made, text = tokenizer(), "Ünïcode, 漢字, \n\t and  double  blanks 🙂"
    assert made.decode(made(text)["input_ids"]) == text


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path):
    made = tokenizer()
    made.pad_token = None
    made.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), "actor_config.model").pad_token_id == made.eos_token_id
