"""Checks of the rows that a run is about to read with its tokenizers."""

from __future__ import annotations

import id_for_id
import pytest
from small_run import settings, write_files
from tiny import llama, tokenizer

from chatrlhf import load_config
from chatrlhf.conversation import Prompt
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.inputs import Inputs, Rows
from chatrlhf.data.stage_rows import Demonstration, PlainText, Preference
from chatrlhf.stages.data_checks import check_pair, check_template, check_tokenizers, few_prompts


def rows(*train) -> Rows:
    return Rows(list(train), [], {}, Epochs.of_all(len(train)))


def test_a_reward_model_with_the_actors_tokenizer_passes():
    assert check_pair(tokenizer(), tokenizer(), ["the cat"]).measured == "it is the actor's, 270 tokens"


def test_another_tokenizer_passes_where_it_knows_what_the_actor_says():
    other = id_for_id.tokenizer("WordPiece")
    result = check_pair(tokenizer(), other, ["hello river"])
    assert result.status == "pass" and "replies are encoded anew" in result.measured
    assert check_pair(tokenizer(), other, ["日本語"]).status == "warn"


@pytest.mark.parametrize("changes", [{}, {"reward_config.reward_fn": "small_run:length"}], ids=["model", "function"])
def test_the_tokenizer_of_a_named_reward_model_is_looked_at_where_it_is_used(tmp_path, changes):
    write_files(tmp_path)
    llama(vocab=270).save_pretrained(tmp_path / "judge")
    tokenizer().save_pretrained(tmp_path / "judge")
    config = load_config(settings(tmp_path), {"reward_config.model": str(tmp_path / "judge")} | changes)
    inputs = Inputs(prompts=rows(Prompt.of("the cat")))
    names = [result.name for result in check_tokenizers(config, ["RL"], inputs, tokenizer())]
    pair = [] if changes else ["tokenizer of the reward model"]
    assert names == ["tokenizer of the actor", *pair]
    assert len(check_tokenizers(config, ["ACTOR"], inputs, tokenizer())) == 1


def test_prompts_are_those_that_the_policy_reads():
    pair = Preference(Prompt.of("judged"), "a", "b")
    shown = Demonstration(Prompt.of("shown"), "a")
    assert few_prompts(Inputs(reward=rows(pair))) == [Prompt.of("judged")]
    inputs = Inputs(actor=rows(shown, PlainText("text")), reward=rows(pair), prompts=rows(Prompt.of("asked")))
    assert few_prompts(inputs) == [Prompt.of("shown"), Prompt.of("asked")]


def test_plain_text_alone_has_no_template_to_check():
    assert check_template(Inputs(actor=rows(PlainText("text"))), None) == []
