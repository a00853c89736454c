"""Prompts and replies of an encoder–decoder as ids: two sequences, closed as the tokenizer closes them."""

import pytest
import tiny
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from chatrlhf.conversation import Prompt, Turn
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.encoder_seq2seq import Seq2SeqEncoder
from chatrlhf.data.stage_rows import Demonstration, PlainText
from chatrlhf.data.templates import FORMATS, Template
from chatrlhf.errors import DataError

LONG = Prompt((Turn("user", "on the mat " * 5), Turn("assistant", "sat"), Turn("user", "the cat")))


def encoder(template: str = "raw", closes: bool = True, max_length: int = 64) -> Seq2SeqEncoder:
    """With a tokenizer that closes every text with EOS, as T5's does."""
    tokenizer = tiny.tokenizer()
    if closes:
        eos = (tokenizer.eos_token, tokenizer.eos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {eos[0]}", None, [eos])
    return Seq2SeqEncoder.of(tokenizer, FORMATS[template], max_length)


@pytest.mark.parametrize("template", ["raw", "hh", "chatllama", "orca"])
@pytest.mark.parametrize("closes", [True, False])
def test_a_prompt_is_closed_as_its_tokenizer_closes_texts(template, closes):
    made = encoder(template, closes)
    plain = Encoder(made.tokenizer, made.template, 64)
    closing = [made.tokenizer.eos_token_id] if closes else []
    for prompt in ("the cat", LONG):
        assert made.prompt(prompt) == plain.prompt(prompt) + closing
    assert made.prompt_lengths(["the cat", LONG]) == [len(made.prompt(each)) for each in ("the cat", LONG)]
    assert made.completion("a", "sat") == made.completion("the cat", "sat")
    assert made.reply(made.completion("a", "sat")) == "sat"


def test_raw_prompts_are_what_the_tokenizer_itself_gives():
    made = encoder("raw")
    assert made.prompt("the cat sat") == made.tokenizer("the cat sat").input_ids


@pytest.mark.parametrize("template", ["raw", "hh", "orca"])
def test_the_saved_template_gives_the_same_ids_and_is_read_again_as_it_was(template, tmp_path):
    made = encoder(template)
    made.save(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    talk = [{"role": turn.role, "content": turn.text} for turn in LONG.turns]
    assert loaded.apply_chat_template(talk, add_generation_prompt=True, return_dict=False) == made.prompt(LONG)
    again = Seq2SeqEncoder.of(loaded, Template.load(tmp_path), 64)
    assert again.prompt(LONG) == made.prompt(LONG) and again.saved_template == made.saved_template


def test_a_row_is_a_prompt_and_a_completion_and_both_are_bounded_together():
    made = encoder(max_length=8)
    ids, labels = made.actor_row(Demonstration(Prompt.of("the cat"), "sat"), "completion")
    assert (ids, labels) == (made.prompt("the cat"), made.completion("a", "sat"))
    assert made.row_length(ids, labels) == len(ids) + len(labels)
    long = Demonstration(LONG, "sat " * 20)
    ids, labels = made.cut_actor_row(long, "completion")
    # Its oldest turns have gone, and then its end.
    assert ids == made.prompt("the cat") and labels == made.completion("a", "sat " * 20)[: 8 - len(ids)]
    assert made.cut_actor_row(Demonstration(Prompt.of("on the mat " * 9), "sat"), "completion")[1] == []


@pytest.mark.parametrize(
    "row, said",
    [
        (PlainText("the cat sat"), "a row of the ACTOR stage is plain text .'the cat sat'."),
        (Demonstration(Prompt.of("the cat"), "sat", "all"), "a loss on 'all'"),
    ],
)
def test_a_row_that_is_no_pair_is_refused(row, said):
    with pytest.raises(DataError, match=said):
        encoder().actor_row(row, "completion")
