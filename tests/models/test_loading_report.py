"""Healthy models load, every tensor the file's, and nothing is said; what is left out of a file is said once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from families import CAUSAL
from safetensors.torch import load_file, save_file
from tiny import ENCODER_DECODERS, bloom, gpt2, llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
)

from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.loading.pretrained import load_backbone, load_language_model
from chatrlhf.models.loading.quantization import quantization_from

FAMILIES = CAUSAL | ENCODER_DECODERS


@pytest.fixture
def said(caplog):
    """What is said while models are loaded."""
    caplog.set_level(logging.WARNING, logger="chatrlhf")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "chatrlhf"]


def random_model(family: str):
    config = FAMILIES[family]
    model = config() if callable(config) else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():  # norms are 1 and biases 0 otherwise, in the file or drawn anew
            weight.add_(0.1 * torch.rand(weight.shape))
    return model.eval()


def assert_same(found, wanted) -> None:
    tensors = wanted.state_dict()
    assert found.state_dict().keys() == tensors.keys()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, tensors[name].float(), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_and_without_its_head(tmp_path, said, family):
    model = random_model(family)
    model.save_pretrained(tmp_path)
    assert_same(load_language_model(str(tmp_path), "k"), model)
    assert_same(load_backbone(str(tmp_path), "k"), backbone_of(model))
    assert said() == []


def in_pytorchs_file(model, folder: Path) -> None:
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # a tied head is in it, too


def with_old_buffers(model, folder: Path) -> None:
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    old = {"attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool), "attn.masked_bias": torch.tensor(-1e4)}
    old |= {"self_attn.rotary_emb.inv_freq": torch.ones(4)}
    weights |= {
        f"{part}.0.{name}": value.clone() for part in ("transformer.h", "model.layers") for name, value in old.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


FORMS = {
    "shards": lambda model, folder: model.save_pretrained(folder, max_shard_size="4KB"),
    "PyTorch's file": in_pytorchs_file,
    "float16": lambda model, folder: model.half().save_pretrained(folder),
    "bfloat16": lambda model, folder: model.bfloat16().save_pretrained(folder),
    "buffers of old versions": with_old_buffers,
}


@pytest.mark.parametrize("make", [llama, gpt2, bloom])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_files_loads(tmp_path, said, form, make):
    model = make().eval()
    FORMS[form](model, tmp_path)
    assert_same(load_language_model(str(tmp_path), "k"), model)
    assert_same(load_backbone(str(tmp_path), "k"), model.base_model)
    assert said() == []


@pytest.mark.parametrize("make", [gpt2, bloom])
def test_a_model_saved_without_its_head_has_the_embeddings_for_one(tmp_path, said, make):
    """As GPT-2's own files are: no `transformer.` in front, no head."""
    model = make().eval()
    model.base_model.save_pretrained(tmp_path)
    assert_same(load_language_model(str(tmp_path), "k"), model)
    assert said() == []


def test_an_encoder_may_lack_what_only_its_own_head_reads(tmp_path, said):
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path)
    assert "pooler.dense.weight" in load_backbone(str(tmp_path), "k").state_dict()
    assert said() == []


def test_heads_and_towers_beside_the_model_are_left_out_and_said_once(tmp_path, said):
    model = llama()
    model.save_pretrained(tmp_path / "trl")
    weights = load_file(tmp_path / "trl" / "model.safetensors")
    weights |= {"v_head.summary.weight": torch.ones(1, 16), "model.visual.merger.bias": torch.ones(1)}
    save_file(weights, tmp_path / "trl" / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        assert_same(load_language_model(str(tmp_path / "trl"), "k"), model)
    sizes = dict(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    DebertaV2ForSequenceClassification(DebertaV2Config(**sizes)).save_pretrained(tmp_path / "deberta")
    load_backbone(str(tmp_path / "deberta"), "reward_config.model")
    first, second = said()
    assert first == (
        f"warning: k: '{tmp_path / 'trl'}' holds 2 tensors that a LlamaForCausalLM does not have "
        "(model.visual.merger.bias, v_head.summary.weight); they are left out"
    )
    assert "holds 4 tensors that a DebertaV2Model does not have (classifier.bias, " in second


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_weights_that_are_quantized_on_the_way_load(tmp_path, said, how, make):
    make().save_pretrained(tmp_path)
    load_language_model(str(tmp_path), "k", None, quantization_from({how: True}, "k"))
    assert said() == []
