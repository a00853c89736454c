"""Stretched rotary positions: what they compute, what is saved of them, and what cannot be stretched."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from tiny import VOCAB, gpt2, llama
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

from chatrlhf import load_config
from chatrlhf.config.model import RopeScaling
from chatrlhf.config.schema import ActorConfig
from chatrlhf.errors import ConfigError
from chatrlhf.models.for_stages import load_actor
from chatrlhf.models.loading.model_info import context_length
from chatrlhf.models.loading.rope import positions, refuse_rotations_by_length, stretch_positions

CPU = torch.device("cpu")


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model with a tokenizer and loads it through the factory with a scaling."""
    from chatrlhf.models.loading.tokenizer import train_tokenizer

    def load(model, **scaling):
        model.save_pretrained(tmp_path)
        train_tokenizer(["a"], 258).save_pretrained(tmp_path)
        config = ActorConfig(model=str(tmp_path), rope_scaling=RopeScaling(**scaling) if scaling else None)
        return load_actor(config, [], CPU)[0]

    return load


@pytest.fixture
def ids():
    return torch.randint(0, VOCAB, (2, 30), generator=torch.Generator().manual_seed(3))


def neox():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = GPTNeoXConfig(vocab_size=300, max_position_embeddings=64, initializer_range=0.3, **sizes)
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("make", [lambda: llama(vocab=300), neox], ids=["llama", "neox (a part of each head turns)"])
@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_a_factor_gives_the_logits_of_the_unscaled_model_at_positions_divided_by_it(saved, ids, make, factor):
    model = make()
    at = (torch.arange(30) / factor).expand(2, -1)
    with torch.no_grad():
        expected = model(ids, position_ids=at).logits
        plain = model(ids).logits
        scaled = saved(model, type="linear", factor=factor)(ids).logits
    assert (scaled - expected).abs().max() < 1e-5
    assert (scaled - plain).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_a_scaling_is_part_of_what_is_saved(saved, ids, kind, tmp_path):
    model = saved(llama(vocab=300, max_position_embeddings=8), type=kind, factor=4)
    assert context_length(model) == 32
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert context_length(again) == 32
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)
    # And is not stretched a second time where it is asked for again.
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "again").config
    stretch_positions(config, RopeScaling(type=kind, factor=4), "k")
    assert config.rope_parameters == model.config.rope_parameters
    assert positions(config) == 32


def test_theta_alone_and_theta_with_a_factor():
    config = LlamaConfig(max_position_embeddings=64)
    stretch_positions(config, RopeScaling(type="default", rope_theta=5e5), "k")
    assert (config.rope_parameters["rope_theta"], positions(config)) == (5e5, 64)
    stretch_positions(config, RopeScaling(type="linear", factor=2, rope_theta=1e6), "k")
    assert (config.rope_parameters["rope_theta"], positions(config)) == (1e6, 128)


def test_the_original_length_is_the_users_where_it_is_given():
    for kind in ("linear", "dynamic", "yarn"):
        config = LlamaConfig(max_position_embeddings=64)
        stretch_positions(config, RopeScaling(type=kind, factor=4, original_max_position_embeddings=32), "k")
        assert positions(config) == 128
    config = LlamaConfig(max_position_embeddings=64)
    stretch_positions(config, RopeScaling(type="yarn", factor=4, beta_fast=16, attention_factor=0.5), "k")
    assert config.rope_parameters["original_max_position_embeddings"] == 64
    assert (config.rope_parameters["beta_fast"], config.rope_parameters["attention_factor"]) == (16, 0.5)


def test_a_model_that_was_stretched_when_it_was_published_is_as_long_as_it_says():
    parameters = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    assert positions(LlamaConfig(max_position_embeddings=128, rope_parameters=dict(parameters))) == 128
    parameters = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert positions(LlamaConfig(max_position_embeddings=128, rope_parameters=parameters)) == 128


def test_of_layers_that_differ_those_that_see_everything_are_stretched():
    config = Gemma3TextConfig(num_hidden_layers=6, max_position_embeddings=64)
    before = {name: dict(each) for name, each in config.rope_parameters.items()}
    stretch_positions(config, RopeScaling(type="linear", factor=8), "k")
    assert config.rope_parameters["sliding_attention"] == before["sliding_attention"]
    assert config.rope_parameters["full_attention"]["factor"] == 8
    assert config.rope_parameters["full_attention"]["rope_theta"] == before["full_attention"]["rope_theta"]
    assert positions(config) == 512


def test_positions_that_do_not_turn_cannot_be_stretched(saved):
    with pytest.raises(ConfigError, match="actor_config.rope_scaling: gpt2 has no rotary positions"):
        saved(gpt2(vocab_size=300), type="linear", factor=2)


def test_rotations_by_length_are_refused_for_rl():
    config = LlamaConfig(max_position_embeddings=64)
    stretch_positions(config, RopeScaling(type="dynamic", factor=2), "k")
    refuse_rotations_by_length(config, 64)
    with pytest.raises(ConfigError, match="'dynamic'.*within 64"):
        refuse_rotations_by_length(config, 65)
    stretch_positions(config, RopeScaling(type="linear", factor=2), "k")
    refuse_rotations_by_length(config, 128)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "linear"}, "factor: type 'linear' needs one"),
        ({"type": "linear", "factor": 1}, "greater than 1"),
        ({"type": "default", "factor": 2}, "changes rope_theta alone"),
        ({"type": "linear", "factor": 2, "beta_fast": 3}, "beta_fast belongs to type 'yarn'"),
        ({"type": "linear", "rope_type": "linear", "factor": 2}, "one setting"),
        ({"type": "other", "factor": 2}, "linear"),
    ],
)
def test_what_does_not_belong_together(values, message):
    with pytest.raises(ValidationError, match=message):
        RopeScaling(**values)


@pytest.mark.parametrize(
    "actor",
    [
        {"superhot": True, "superhot_config": {"type": "linear", "scale": 2}},
        {"superhot": {"type": "linear", "scale": 2}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ],
)
def test_openassistants_key_is_the_same(actor):
    made = load_config({"actor_config": actor}).actor_config.rope_scaling
    assert (made.type, made.factor) == ("linear", 2.0)


def test_a_switch_that_is_off_and_one_without_settings():
    off = {"superhot": False, "superhot_config": {"type": "linear", "scale": 2}}
    assert load_config({"actor_config": off}).actor_config.rope_scaling is None
    with pytest.raises(ConfigError, match="superhot_config"):
        load_config({"actor_config": {"superhot": True}})
