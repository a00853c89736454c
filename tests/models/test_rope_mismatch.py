"""A warning where adapters meet rotary positions that they were not trained with."""

from __future__ import annotations

import json

import pytest
from tiny import gpt2, llama, tokenizer

from chatrlhf.config.model import PeftConfig, RopeScaling
from chatrlhf.models.loading.lora import BASE_CONFIG, add_adapters, save_model
from chatrlhf.models.loading.rope import stretch_positions
from chatrlhf.models.loading.rope_mismatch import scaling_warning

BY_8, BY_4 = (RopeScaling(type="linear", factor=factor) for factor in (8, 4))


def saved(folder, scaling=None, make=llama, own=None):
    """Adapters on a base whose configuration was stretched when they were trained, and is ``own`` on the disk."""
    base = folder / "base"
    for target, stretched in ((base, own), (folder / "adapters", scaling)):
        policy = make()
        if stretched is not None:
            stretch_positions(policy.config, stretched, "k")
        if target == base:
            policy.save_pretrained(base)
        else:
            add_adapters(policy, PeftConfig(), str(base))
            save_model(policy, target)
    tokenizer().save_pretrained(base)
    return str(folder / "adapters")


@pytest.mark.parametrize("asked", [None, BY_8])
def test_nothing_is_said_where_all_is_as_it_was(tmp_path, asked):
    assert scaling_warning(saved(tmp_path, BY_8), asked) is None
    assert scaling_warning(saved(tmp_path / "both", BY_8, own=BY_8), asked) is None
    assert scaling_warning(saved(tmp_path / "none"), None) is None


@pytest.mark.parametrize("trained, asked", [(BY_8, BY_4), (None, BY_8)])
def test_another_scaling_that_is_asked_for(tmp_path, trained, asked):
    folder = saved(tmp_path, trained)
    said = scaling_warning(folder, asked)
    assert folder in said and "actor_config.rope_scaling asks for 'linear' (factor" in said
    assert f"factor {asked.factor:g}" in said and "with which they are worse" in said
    assert ("factor 8" if trained else "'default' (rope_theta 10000)") in said
    assert "which is not heeded" in scaling_warning(folder, asked, heeded=False)


def test_another_kind_or_theta_of_the_same_factor(tmp_path):
    folder = saved(tmp_path, BY_8)
    assert "'yarn' (factor 8" in scaling_warning(folder, RopeScaling(type="yarn", factor=8))
    assert "rope_theta 50000" in scaling_warning(folder, RopeScaling(type="linear", factor=8, rope_theta=50000))


@pytest.mark.parametrize("own", [BY_4, RopeScaling(type="default", rope_theta=50000)])
def test_a_base_that_is_stretched_otherwise(tmp_path, own):
    folder = saved(tmp_path, BY_8, own=own)
    said = scaling_warning(folder, None)
    assert str(tmp_path / "base") in said and "check that this is the base they belong to" in said
    assert ("factor 4" if own is BY_4 else "rope_theta 50000") in said
    # Where the configuration says it again, it is meant.
    assert scaling_warning(folder, BY_8) is None


def test_nothing_is_said_of_whole_models_of_strangers_and_of_models_without_rotation(tmp_path):
    folder = saved(tmp_path, BY_8)
    assert scaling_warning(str(tmp_path / "base"), BY_4) is None
    assert scaling_warning("some/model-of-the-hub", BY_4) is None
    (tmp_path / "adapters" / BASE_CONFIG).unlink()
    assert scaling_warning(folder, BY_4) is None
    assert scaling_warning(saved(tmp_path / "gpt2", make=gpt2), None) is None


def test_the_configuration_beside_adapters_holds_what_is_compared(tmp_path):
    written = json.loads((tmp_path / saved(tmp_path, BY_8) / BASE_CONFIG).read_text())
    assert written["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 8.0}
