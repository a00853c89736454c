"""What lies under a language model's head, in causal models and encoder–decoders, and that files keep it."""

import copy

import pytest
import torch
from tiny import ENCODER_DECODERS, bart, flan_t5, llama, t5
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Model

from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.backbone import backbone_of, decoder_start, language_model_class, read_by

IDS = torch.arange(2, 9)[None]


@pytest.mark.parametrize("make", [llama, bart])
def test_where_a_model_has_one_it_is_taken(make):
    model = make()
    assert backbone_of(model) is model.model and backbone_of(model.model) is model.model


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_it_gives_the_states_that_the_head_reads(family):
    model = ENCODER_DECODERS[family]().eval()
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(**read_by(model.config, IDS))
        states = backbone_of(model)(**read_by(model.config, IDS)).last_hidden_state
    scale = 16**-0.5 if family == "t5" else 1.0  # T5's head reads them scaled
    torch.testing.assert_close(states * scale, seen[0])


def test_t5s_is_made_once_of_the_models_own_parts_and_is_none_of_its_children():
    model = flan_t5()
    names = list(model.state_dict())
    made = backbone_of(model)
    assert isinstance(made, T5Model) and backbone_of(model) is made and backbone_of(made) is made
    assert made.encoder is model.encoder and made.decoder is model.decoder and made.shared is model.shared
    assert list(model.state_dict()) == names and made not in list(model.modules())


def test_a_copy_of_the_model_has_a_copy_of_it():
    model = flan_t5()
    backbone_of(model)
    copied = copy.deepcopy(model)
    assert backbone_of(copied) is not backbone_of(model)
    assert backbone_of(copied).decoder is copied.decoder
    alone = copy.deepcopy(backbone_of(model))
    assert not {id(each) for each in alone.parameters()} & {id(each) for each in model.parameters()}
    assert not any("lm_head" in name for name in alone.state_dict())


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_what_is_saved_computes_the_same_when_it_is_loaded(family, tmp_path):
    model = ENCODER_DECODERS[family]().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        want = model(**read_by(model.config, IDS)).logits
    model.save_pretrained(tmp_path)
    assert language_model_class(model.config) is AutoModelForSeq2SeqLM
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**read_by(loaded.config, IDS)).logits, want)
    assert decoder_start(loaded.config) == decoder_start(model.config)


def test_a_causal_model_is_loaded_as_one():
    assert language_model_class(llama().config) is AutoModelForCausalLM
    assert read_by(llama().config, IDS).keys() == {"input_ids"}


def test_a_model_without_a_start_token_is_refused():
    with pytest.raises(ConfigError, match="this t5 names no decoder_start_token_id"):
        decoder_start(t5(decoder_start_token_id=None).config)
