"""A classifier as a reward model gives each row the score that the classifier gives it alone, in every family."""

import pytest
import torch
from classifiers import LAST, ONE_BY_ONE, OWN, alone, chat_tokenizer, classifier, pair_tokenizer, save

from chatrlhf.data.collate import pad_right
from chatrlhf.data.templates import FORMATS
from chatrlhf.data.text_pairs import TextPairEncoder
from chatrlhf.models.classifier_reward import reward_model_of
from chatrlhf.models.loading.model_info import context_length
from chatrlhf.models.own_pooling import token_types

EOS, PAD = 0, 1
# Closed by EOS; with the pad token in the text, or at its end; with EOS in the text; of several lengths.
ROWS = [[5, 6, 7, 8, 9, 10, EOS], [5, PAD, 9, EOS], [8, 12, 3, EOS, PAD], [6, EOS, 4, EOS], [7, EOS], [9, 4, 11, EOS]]
PADS = [PAD, None, EOS, -1]


def in_a_batch(model, rows=ROWS, filled_with: int = 3) -> torch.Tensor:
    ids, mask = pad_right(rows, filled_with)
    with torch.no_grad():
        return model.eval().raw(ids, mask)


@pytest.mark.parametrize(
    "family, pad", [*((family, pad) for family in LAST for pad in PADS), ("gpt2", 99), ("bloom", 99)]
)
def test_a_linear_head_on_the_last_token(family, pad):
    made = classifier(family, pad_token_id=pad)
    expected = alone(made, ROWS)
    model = reward_model_of(made)
    assert (model.pooling, model.takes_padding) == ("last", True)
    torch.testing.assert_close(in_a_batch(model), expected, rtol=0, atol=1e-5)
    assert len(set(expected.tolist())) == len(ROWS)


@pytest.mark.parametrize("family", [*OWN, *ONE_BY_ONE])
def test_any_other_head_on_the_pooling_of_its_family(family):
    made = classifier(family)
    expected = alone(made, ROWS)
    model = reward_model_of(made)
    assert (model.pooling, model.takes_padding) == ("own", family not in ONE_BY_ONE)
    torch.testing.assert_close(in_a_batch(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "fnet"])
def test_gradients_do_not_depend_on_the_batch(family):
    made = reward_model_of(classifier(family)).eval()
    made.raw(*pad_right(ROWS, 3)).square().sum().backward()
    together = {name: weight.grad.clone() for name, weight in made.named_parameters() if weight.grad is not None}
    made.zero_grad()
    for row in ROWS:
        made.raw(*pad_right([row], 3)).square().sum().backward()
    for name, weight in made.named_parameters():
        if weight.grad is not None:
            torch.testing.assert_close(together[name], weight.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_a_rotation_that_depends_on_the_longest_row_is_kept_from_it():
    # Beyond 16 positions a row turns in another way, more than what a classifier is tried on; the others must not.
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    made = classifier("llama", max_position_embeddings=16, rope_parameters=rope)
    rows = [*ROWS, [4, 5, 6, 7] * 6]
    expected = alone(made, rows)
    torch.testing.assert_close(in_a_batch(reward_model_of(made), rows), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("double, types", [(False, True), (True, False)], ids=["bert", "roberta"])
def test_a_pair_of_texts_is_framed_as_its_tokenizer_does(double, types):
    words = pair_tokenizer(types, double)
    encoder = TextPairEncoder(words, FORMATS["raw"], 64)
    row, plain = encoder.row("the cat", "sat on the mat"), words("the cat", "sat on the mat")
    assert row == plain["input_ids"] == encoder.prompt("the cat") + encoder.completion("the cat", "sat on the mat")
    assert encoder.prompt_lengths(["the cat"]) == [len(encoder.prompt("the cat"))]
    assert encoder.completion_lengths([("a", "sat")]) == [len(encoder.completion("a", "sat"))]
    if types:
        found = token_types(torch.tensor([row]), encoder.separator())[0].tolist()
        assert found == plain["token_type_ids"]
    else:
        assert encoder.separator() is None


def test_a_pair_beyond_the_context_loses_the_beginning_of_its_prompt_and_keeps_its_frame():
    whole = TextPairEncoder(pair_tokenizer(), FORMATS["raw"], 64)
    cls, sep = whole.tokenizer.cls_token_id, whole.tokenizer.sep_token_id
    prompt, reply = (
        whole.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("the cat sat on the mat", "no hat")
    )
    short = TextPairEncoder(whole.tokenizer, FORMATS["raw"], len(reply) + 5)
    assert short.row("the cat sat on the mat", "no hat") == [cls, *prompt[-2:], sep, *reply, sep]
    shorter = TextPairEncoder(whole.tokenizer, FORMATS["raw"], 5)
    assert shorter.row("the cat sat on the mat", "no hat") == [cls, sep, *reply[-2:], sep]


def test_roberta_counts_positions_from_behind_its_pad_token():
    assert context_length(classifier("roberta").base_model) == 62  # of 64; the pad token is 1
    assert context_length(classifier("bert").base_model) == 64
    assert context_length(classifier("xlnet").base_model) > 1 << 20


def test_a_saved_classifier_of_chat_is_loaded_with_its_labels(tmp_path):
    from chatrlhf.models.loading.sequence_classifier import is_classifier, load_sequence_classifier

    made = classifier(vocab=270)
    folder = str(save(tmp_path / "rm", made, chat_tokenizer(None)))
    assert is_classifier(folder, "key")
    torch.testing.assert_close(alone(load_sequence_classifier(folder, "key"), ROWS), alone(made, ROWS), rtol=0, atol=0)
