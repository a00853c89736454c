"""generation_config.json: what transformers would refuse to save is mended, what it cannot read is refused by name."""

from __future__ import annotations

import json

import pytest
from tiny import llama
from transformers import AutoModelForCausalLM, GenerationConfig

from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.generation_config import adopt_generation_config, check_generation_config, make_savable

LLAMA_2_CHAT = {"temperature": 0.9, "top_p": 0.6, "max_length": 4096}


@pytest.fixture
def made(tmp_path):
    """A model loaded from a folder with this generation_config.json."""

    def load(**settings):
        llama().save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(settings))
        return AutoModelForCausalLM.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize(
    "settings, mended",
    [
        (LLAMA_2_CHAT, LLAMA_2_CHAT | {"do_sample": True}),
        ({"top_k": 20}, {"do_sample": True, "top_k": 20}),
        ({"top_k": 50, "top_p": 0.8, "repetition_penalty": 1.05}, {"do_sample": True, "repetition_penalty": 1.05}),
        ({"typical_p": 0.9}, {"do_sample": True}),
        ({"min_p": 0.1, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "top_h": 0.3}, {"do_sample": True, "min_p": 0.1}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, {"do_sample": False, "temperature": None}),
        ({"temperature": 0.0, "top_p": 0.8}, {"do_sample": None, "temperature": None, "top_p": None}),
        ({"num_beams": 4, "temperature": 0.7}, {"do_sample": None, "temperature": None, "num_beams": 4}),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": None, "length_penalty": None}),
        ({"use_cache": False, "cache_implementation": "static"}, {"use_cache": False, "cache_implementation": None}),
        ({"output_scores": True}, {"output_scores": None}),
        ({"pad_token_id": -1}, {"pad_token_id": None}),
    ],
    ids=str,
)
def test_what_would_not_be_saved_is_mended_once_and_said(made, settings, mended, tmp_path):
    model = made(**settings)
    with pytest.raises(ValueError, match="is invalid"):
        model.save_pretrained(tmp_path / "refused")
    (said,) = make_savable(model)
    assert said.startswith("generation_config.json, which transformers would not save: ") and make_savable(model) == []
    model.save_pretrained(tmp_path / "again")
    again = GenerationConfig.from_pretrained(tmp_path / "again")
    assert {name: getattr(again, name) for name in mended} == mended


def test_what_can_be_saved_is_left_alone(made):
    model = made(do_sample=True, temperature=0.7, top_p=0.8, num_beams=1)
    before = model.generation_config.to_dict()
    assert make_savable(model) == [] and model.generation_config.to_dict() == before


def test_what_cannot_be_mended_is_refused_before_training(made):
    model = made()
    model.generation_config.max_new_tokens = 0
    with pytest.raises(ConfigError, match=r"generation_config.json of '.*' cannot be saved again .*max_new_tokens"):
        make_savable(model)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "Expecting property name"),
        ("[1]", "expected a JSON object, got list"),
        ("null", "expected a JSON object, got NoneType"),
        ('{"num_return_sequences": 3}', "num_return_sequences"),
        ('{"early_stopping": "x"}', "early_stopping"),
        ('{"max_new_tokens": 0}', "max_new_tokens"),
        ('{"cache_implementation": "mine"}', "cache_implementation"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, reason):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"^the.key: generation_config.json of .*{reason}.* correct that file"):
        check_generation_config(str(tmp_path), "the.key")


def test_a_folder_without_one_is_no_fault(tmp_path):
    check_generation_config(str(tmp_path), "the.key")


def test_the_base_of_adapters_takes_what_lies_beside_them(tmp_path):
    model = llama()
    adopt_generation_config(model, tmp_path)
    assert model.generation_config.eos_token_id == 1
    GenerationConfig(eos_token_id=[3, 1]).save_pretrained(tmp_path)
    adopt_generation_config(model, tmp_path)
    assert model.generation_config.eos_token_id == [3, 1]
