"""Sequence classifiers as rewards, used as they are: the score is that of the model itself, a row at a time."""

import pytest
import torch
from classifiers import alone, chat_tokenizer, classifier, pair_tokenizer, save
from field_reports import report
from safetensors.torch import load_file, save_file

from chatrlhf.config.schema import RewardConfig
from chatrlhf.conversation import Prompt, Turn
from chatrlhf.errors import ConfigError
from chatrlhf.models.classifier import LazyClassifier, is_used_as_it_is, load_classifier

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
PROMPTS, REPLIES = (
    ["the cat", "hat", "what is on the mat, a <|pad|>?"],
    ["sat on the mat", "the hat is on the cat", "a"],
)
CPU = torch.device("cpu")


def turns(prompt: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]


def loaded(folder, **keys):
    return load_classifier(RewardConfig(model=str(folder), **keys), CPU)


@report(
    "huggingface/transformers#35352",
    "YangRui2015/Generalizable-Reward-Model#1",
    "allenai/reward-bench#115",
    "huggingface/trl#937",
    fault="a classifier without pad token, or with EOS as one, whose template ends replies by EOS: it is read early",
    expected="the score that the model gives that row alone, in any batch and order",
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "in_config, in_tokenizer",
    [(None, None), (1, None), (1, "<|pad|>"), (None, "<|pad|>"), (0, None), (0, "<|endoftext|>"), (1, "<|endoftext|>")],
)
def test_the_pad_token_changes_no_score(family, in_config, in_tokenizer, tmp_path):
    words = chat_tokenizer(CHAT, in_tokenizer)
    words.padding_side = "left"
    made = classifier(family, len(words), pad_token_id=in_config)
    reward = loaded(save(tmp_path, made, words))
    texts = [words.apply_chat_template(turns(*row), tokenize=False) for row in zip(PROMPTS, REPLIES, strict=True)]
    rows = [words(text, add_special_tokens=False)["input_ids"] for text in texts]
    expected = alone(made, rows).tolist()
    assert reward(PROMPTS, REPLIES) == pytest.approx(expected, abs=1e-4)
    assert reward(PROMPTS[::-1], REPLIES[::-1]) == pytest.approx(expected[::-1], abs=1e-4)


@report(
    "allenai/reward-bench#164",
    "RLHFlow/RLHF-Reward-Modeling#16",
    fault="the template renders BOS and the tokenizer adds one",
    expected="one BOS with a chat template, the tokenizer's own special tokens without",
)
@pytest.mark.parametrize("template", ["{{ bos_token }}" + CHAT, None])
def test_one_bos(template, tmp_path):
    from tokenizers.processors import TemplateProcessing

    words = chat_tokenizer(template)
    words.add_special_tokens({"bos_token": "<s>"})
    bos = words.bos_token_id
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    reward = loaded(save(tmp_path, classifier(vocab=len(words)), words))
    rows = [ids for ids, _ in reward._rows(PROMPTS, REPLIES)]
    assert all(row[0] == bos and row.count(bos) == 1 for row in rows)


@pytest.mark.parametrize("family, types, double", [("bert", True, False), ("roberta", False, True)])
def test_an_encoder_reads_a_pair_with_its_token_types(family, types, double, tmp_path):
    words = pair_tokenizer(types, double)
    made = classifier(family, len(words))
    encoded = [words(*row) for row in zip(PROMPTS, REPLIES, strict=True)]
    own = [row["token_type_ids"] for row in encoded] if types else None
    expected = alone(made, [row["input_ids"] for row in encoded], own)
    assert loaded(save(tmp_path, made, words))(PROMPTS, REPLIES) == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_dialogue_is_rendered_by_its_turns(tmp_path):
    words = chat_tokenizer(CHAT)
    reward = loaded(save(tmp_path, classifier(vocab=len(words)), words))
    prompt = Prompt((Turn("user", "the cat"), Turn("assistant", "sat"), Turn("user", "the hat")), system="on the mat")
    messages = [{"role": "system", "content": "on the mat"}, *turns("the cat", "sat"), *turns("the hat", "is")]
    text = words.apply_chat_template(messages, tokenize=False)
    assert reward._rows([prompt], ["is"])[0][0] == words(text, add_special_tokens=False)["input_ids"]


def test_what_is_cut_for_the_context_is_said_once(tmp_path):
    words = chat_tokenizer(CHAT)
    made = classifier(vocab=len(words))
    reward = loaded(save(tmp_path, made, words), max_sequence_length=12)
    with pytest.warns(UserWarning, match=r"more than 12 tokens lose their beginning .*\(3 of the first 3\)") as said:
        scores = reward(PROMPTS, REPLIES)
        reward(PROMPTS, REPLIES)
    assert len(said) == 1
    text = words.apply_chat_template(turns(PROMPTS[0], REPLIES[0]), tokenize=False)
    ids = words(text, add_special_tokens=False)["input_ids"][-12:]
    assert scores[0] == pytest.approx(alone(made, [ids]).item(), abs=1e-4)


@pytest.mark.parametrize("template", ["{{ raise_exception('turns must alternate') }}", "{{ documents[0].text }}"])
def test_a_template_that_refuses_a_shape_is_one_line_before_the_run(template, tmp_path):
    folder = save(tmp_path, classifier(vocab=270), chat_tokenizer(template))
    with pytest.raises(
        ConfigError, match="reward_config.model: the chat template .* roles user, assistant .*tokenizer_p"
    ):
        LazyClassifier(RewardConfig(model=str(folder))).check(PROMPTS)


@report(
    "OpenRLHF/OpenRLHF#643",
    "OpenRLHF/OpenRLHF#209",
    "hiyouga/LlamaFactory#7706",
    fault="weights newly initialized: ['score.weight']: a random judge",
    expected="refused before the run; the missing weights are named",
)
@pytest.mark.parametrize("lost, when", [("score.weight", "before"), ("model.layers.1.mlp.up_proj.weight", "loading")])
def test_a_classifier_without_its_weights_is_refused(lost, when, tmp_path):
    folder = save(tmp_path, classifier(vocab=270), chat_tokenizer(None))
    weights = load_file(folder / "model.safetensors")
    del weights[lost]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    section = RewardConfig(model=str(folder))
    with pytest.raises(ConfigError, match=f"reward_config.model: .* (is a classifier without |lacks 1 of .*[(]){lost}"):
        is_used_as_it_is(section, ["RL"], tmp_path / "none") if when == "before" else load_classifier(section, CPU)
