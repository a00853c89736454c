"""Fine-tuning an encoder–decoder: what is trained on what, over all labels of a step, and noise where it reads."""

import types

import pytest
import tiny
import torch

from chatrlhf.data.encoder import IGNORED
from chatrlhf.stages.sft_seq2seq import NOISE, PairCollator, noise_on_embeddings, reply_loss

ROWS = [{"input_ids": [5, 6, 7], "labels": [8, 1]}, {"input_ids": [9], "labels": [10, 11, 12, 1]}]


def test_a_batch_by_hand():
    batch = PairCollator(pad_id=0, start=3)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 1, IGNORED, IGNORED], [10, 11, 12, 1]]
    assert batch["decoder_input_ids"].tolist() == [[3, 8, 1, 0], [3, 10, 11, 12]]


@pytest.mark.parametrize("family", ["t5", "flan_t5", "bart"])
def test_the_loss_is_the_models_own(family):
    model = tiny.ENCODER_DECODERS[family]().eval()
    batch = PairCollator(pad_id=0, start=model.config.decoder_start_token_id)(ROWS)
    labels = batch.pop("labels")
    decoder_ids = batch.pop("decoder_input_ids")
    # Behind the end of a reply the model itself shifts its labels to other ids, which nothing reads.
    own = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(own[labels != IGNORED], decoder_ids[labels != IGNORED])
    outputs = model(**batch, labels=labels)
    got = reply_loss(model(**batch, decoder_input_ids=decoder_ids), labels)
    torch.testing.assert_close(got, outputs.loss)


def test_parts_of_a_step_add_up_to_its_mean_and_smoothing_is_spread_over_the_vocabulary():
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    whole = reply_loss(types.SimpleNamespace(logits=logits), labels, smoothing=0.1)
    parts = [
        reply_loss(types.SimpleNamespace(logits=logits[i : i + 1]), labels[i : i + 1], torch.tensor(3), 0.1)
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)
    logprobs = logits.log_softmax(-1)
    terms = [-0.9 * logprobs[i, t, labels[i, t]] - 0.1 * logprobs[i, t].mean() for i, t in ((0, 0), (0, 1), (1, 0))]
    torch.testing.assert_close(whole, sum(terms) / 3)
    nothing = torch.full_like(labels, IGNORED)
    assert reply_loss(types.SimpleNamespace(logits=logits), nothing) == 0


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_noise_is_added_where_ids_are_read_on_both_sides_and_in_training_alone(family):
    model = tiny.ENCODER_DECODERS[family](**({"dropout_rate": 0.0} if family == "t5" else {"dropout": 0.0}))
    batch = PairCollator(0, 1)(ROWS)

    def states():
        with torch.no_grad():
            out = model(**{name: each for name, each in batch.items() if name != "labels"})
        return out.encoder_last_hidden_state, out.logits

    for training in (True, False):
        model.train(training)
        plain = states()
        with noise_on_embeddings(model, 5.0):
            assert all(torch.equal(*each) != training for each in zip(states(), plain, strict=True))
        assert all(map(torch.equal, states(), plain))
    embeddings = [side.get_input_embeddings() for side in (model.get_encoder(), model.get_decoder())]
    assert not any(hasattr(each, NOISE) or each._forward_hooks for each in embeddings)
    with noise_on_embeddings(model, None):
        assert not any(each._forward_hooks for each in embeddings)
