"""Dimensions of published models: the parameters that they give are those that were published."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from chatrlhf.errors import ConfigError
from chatrlhf.tools.plan.published_shapes import has_shape, shape_names, shape_settings

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-1.3b": 1_315_758_080,
    "EleutherAI/gpt-j-6b": 6_050_882_784,
    "EleutherAI/gpt-neox-20b": 20_554_567_680,
    "bigscience/bloomz-560m": 559_214_592,
    "huggyllama/llama-7b": 6_738_415_616,
    "huggyllama/llama-30b": 32_528_943_616,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "google/gemma-2b": 2_506_172_416,
    "OpenAssistant/reward-model-deberta-v3-large-v2": 434_012_160,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_the_published_number_of_parameters(name):
    settings = shape_settings(name)
    auto = AutoModel if settings.model_type == "deberta-v2" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(settings)
    assert sum(each.numel() for each in model.parameters()) == PUBLISHED[name]


def test_the_models_that_the_documents_name_have_shapes():
    named = ["llama-7b", "llama-13b", "llama-33b", "llama-2-7b", "llama-2-13b", "vicuna-13b-v0", "gpt-j-6b"]
    named += ["gpt-neox-20b", "gpt-neo-1.3b", "opt-13b", "bloom-7b1", "galactica-6.7b", "flan-t5-xxl", "gpt2-large"]
    assert set(named) <= set(shape_names())
    assert has_shape("Meta-Llama/LLAMA-2-7b-hf")  # hub ids do not depend on the case


def test_an_unknown_name_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match="'missing/nothing': its dimensions are not known.*gpt2"):
        shape_settings("missing/nothing")
