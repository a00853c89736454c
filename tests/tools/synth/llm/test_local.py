"""Models on this machine: replies that do not depend on the batch, choices, and chats as each model knows them."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from chatrlhf.errors import GenerationError
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.synth.llm import Message, NoAnswer, Request
from chatrlhf.tools.synth.llm.local_model import LocalModel, flat

TEXTS = ["How are you? I am well, and you?", "Human: a question\n\nAssistant: an answer. 0 1 2 3 4 5 . A B"] * 8


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def causal(tokenizer, tmp_path_factory):
    """A folder with a causal model of random weights, without a chat template."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, initializer_range=0.3, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flan(tokenizer, tmp_path_factory):
    """A folder with an encoder-decoder of T5's kind."""
    folder = tmp_path_factory.mktemp("flan")
    torch.manual_seed(0)
    sizes = dict(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    ids = dict(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def local(folder, max_batch_size: int) -> LocalModel:
    """What a model says depends on the name by which it is asked, and a test's folder has another one each time."""
    model = LocalModel(str(folder), max_batch_size)
    model.model = "a model"
    return model


def ask(model: LocalModel, requests):
    async def main():
        return await asyncio.gather(*map(model.reply, requests), return_exceptions=True)

    return asyncio.run(main())


def question(text: str, max_tokens: int = 8, temperature: float = 1.0, **options) -> Request:
    return Request((Message("user", text),), temperature, max_tokens, **options)


@pytest.mark.parametrize("kind", ["causal", "flan"])
def test_a_reply_does_not_depend_on_what_else_is_in_the_batch(kind, request):
    folder = str(request.getfixturevalue(kind))
    requests = [question("How are you?" + " Well." * i, nth=i) for i in range(6)]
    together = ask(local(folder, 6), requests)
    alone = ask(local(folder, 1), requests)
    in_threes = ask(local(folder, 3), requests[::-1])[::-1]
    assert together == alone == in_threes
    assert len({reply.text for reply in together}) > 3


def test_replies_are_drawn_from_the_models_distribution(causal):
    model = local(causal, 64)
    replies = ask(model, [question("How are you?", 1, nth=i) for i in range(3000)])
    counts = Counter(reply.text for reply in replies)
    ids = torch.tensor([model.prompt_ids((Message("user", "How are you?"),))])
    with torch.no_grad():
        probabilities = model.network(ids).logits[0, -1].softmax(dim=0)
    expected = Counter()
    for token, probability in enumerate(probabilities.tolist()):
        expected[model.tokenizer.decode([token], skip_special_tokens=True)] += probability
    # Shares of 3,000 draws: four deviations of the widest are 0.036.
    for text, probability in expected.items():
        assert counts[text] / 3000 == pytest.approx(probability, abs=0.036)
    assert max(expected.values()) > 0.1


def test_without_temperature_the_likeliest_token_is_taken(causal):
    model = local(causal, 2)
    first, second = ask(model, [question("How are you?", temperature=0.0, nth=i) for i in range(2)])
    ids = torch.tensor([model.prompt_ids((Message("user", "How are you?"),))])
    greedy = model.network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert first.text == second.text == model.tokenizer.decode(greedy[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_temperature_divides_the_logits(causal, temperature):
    model = local(causal, 64)
    replies = ask(model, [question("How are you?", 1, temperature, nth=i) for i in range(3000)])
    ids = torch.tensor([model.prompt_ids((Message("user", "How are you?"),))])
    with torch.no_grad():
        probabilities = (model.network(ids).logits[0, -1] / temperature).softmax(dim=0)
    finished = sum(reply.finished for reply in replies) / 3000
    expected = probabilities[model.tokenizer.eos_token_id].item()
    said = Counter(reply.text for reply in replies)
    # How often a reply repeats another's: the sum of squared shares, which a temperature lowers.
    texts = Counter()
    for token, probability in enumerate(probabilities.tolist()):
        texts[model.tokenizer.decode([token], skip_special_tokens=True)] += probability
    drawn = sum((count / 3000) ** 2 for count in said.values())
    assert drawn == pytest.approx(sum(share**2 for share in texts.values()), rel=0.1)
    assert finished == pytest.approx(expected, abs=0.02)


def test_a_reply_ends_at_every_eos_of_the_model_and_holds_no_id_without_a_token(tokenizer, causal, tmp_path):
    """Its head is padded by four rows which it likes best; <|eom|> comes next."""
    words = copy.deepcopy(tokenizer)
    words.add_special_tokens({"extra_special_tokens": ["<|eom|>"]})
    network = LlamaForCausalLM.from_pretrained(causal)
    network.resize_token_embeddings(len(words) + 4, mean_resizing=False)
    with torch.no_grad():
        network.lm_head.weight[-5:] = network.lm_head.weight[50] * torch.tensor([20.0] + [30.0] * 4)[:, None]
    network.generation_config.eos_token_id = [words.eos_token_id, words.convert_tokens_to_ids("<|eom|>")]
    network.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    replies = ask(local(tmp_path, 8), [question("How are you?" * (i + 1), 40, nth=i) for i in range(8)])
    assert all(reply.finished and "<|" not in reply.text for reply in replies)
    assert any(reply.completion_tokens > 1 for reply in replies)


@pytest.mark.parametrize("kind", ["causal", "flan"])
def test_a_request_with_choices_gets_one_of_them(kind, request):
    model = local(request.getfixturevalue(kind), 40)
    choices = ("0", "1", "1.5", "10", "A")
    requests = [question(f"How good is {i}?", choices=choices, temperature=3.0) for i in range(40)]
    replies = ask(model, [*requests, question("free", nth=1)])
    assert {reply.text for reply in replies[:-1]} <= set(choices)
    assert len({reply.text for reply in replies[:-1]}) > 2
    assert all(reply.finished for reply in replies[:-1])
    assert replies[-1].text not in choices


def test_tokens_are_counted_and_a_cut_reply_is_known_as_one(causal):
    model = local(causal, 4)
    (cut,) = ask(model, [question("How are you?", 3)])
    assert (cut.prompt_tokens, cut.completion_tokens, cut.finished) == (
        len(model.tokenizer("How are you?").input_ids),
        3,
        False,
    )
    (whole,) = ask(model, [question("How are you?", 3, choices=("A",))])
    assert (whole.completion_tokens, whole.finished) == (2, True)


def test_a_prompt_without_room_has_no_answer(causal):
    model = local(causal, 4)
    short, long = ask(model, [question("a"), question("How are you? " * 100)])
    assert short.text
    assert isinstance(long, NoAnswer)
    assert "do not fit into the 256" in str(long)


def test_chats_are_flat_texts_where_a_model_has_no_template():
    alone = (Message("user", "a question"),)
    assert flat(alone, opens_reply=True) == "a question"
    assert flat((Message("system", "s"), *alone), opens_reply=True) == "s\n\na question"
    dialogue = (Message("system", "s"), *alone, Message("assistant", "an answer"), Message("user", "and?"))
    shown = "s\n\nHuman: a question\n\nAssistant: an answer\n\nHuman: and?"
    assert flat(dialogue, opens_reply=False) == shown
    assert flat(dialogue, opens_reply=True) == shown + "\n\nAssistant:"


def test_a_models_own_template_is_its_way_to_know_chats(causal, tmp_path):
    model = local(causal, 1)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = model.prompt_ids(
        (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))
    )
    assert model.tokenizer.decode(ids) == "<user>s\n\nu<assistant>a<user>v<assistant>"


def test_a_base_model_does_not_speak_for_the_other_side(causal):
    model = local(causal, 1)
    reply = model._reply(model.tokenizer(" an answer\n\nHuman: and more").input_ids, 3)
    assert (reply.text, reply.finished) == (" an answer", True)


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path):
    with pytest.raises(GenerationError, match="--model") as caught:
        LocalModel(str(tmp_path))
    assert "\n" not in str(caught.value)
