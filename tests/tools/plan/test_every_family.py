"""Every family has a plan in every way of training, from its configuration alone."""

from __future__ import annotations

import copy

import pytest
import torch
from families import CAUSAL, VOCAB
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BartConfig,
    GPTNeoConfig,
    MambaConfig,
    T5Config,
)

from chatrlhf.errors import ConfigError
from chatrlhf.tools.plan.compare import WAYS, compare
from chatrlhf.tools.plan.hardware import hardware

PAIRED = {
    "Flan-T5": T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
    ),
    "BART": BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=96,
    ),
}


MORE = {
    "GPT-Neo": GPTNeoConfig(
        vocab_size=VOCAB, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]], window_size=8
    ),
}
AT_ONCE, IN_CI = ("LLaMA",), ("BLOOM", "Mixtral", "Flan-T5")
FAMILIES = CAUSAL | MORE | PAIRED


def marked(name: str) -> object:
    marks = [] if name in AT_ONCE else [pytest.mark.slow]
    return pytest.param(name, marks=marks if name in (*AT_ONCE, *IN_CI) else [*marks, pytest.mark.nightly])


@pytest.mark.slow
@pytest.mark.parametrize("family", [marked(name) for name in FAMILIES])
def test_a_family_has_a_plan_in_every_way(family, tmp_path):
    settings = copy.deepcopy(FAMILIES[family])
    settings.hidden_size = 512  # adapters are to be small beside the weights
    settings.save_pretrained(tmp_path)
    # Where not even a row fits, no second one is planned: the others are quicker so.
    gpu = "24GB" if family in AT_ONCE else "1GB"
    found = {each.way.name: each for each in compare([str(tmp_path)], hardware(gpu), 64)}
    assert list(found) == [way.name for way in WAYS]
    assert {each.fits for each in found.values()} == {family in AT_ONCE}
    memory = {name: each.memory for name, each in found.items()}
    assert memory["SFT, QLoRA"] < memory["SFT, LoRA"] < memory["SFT"]
    assert memory["PPO, QLoRA"] < memory["PPO, LoRA"] < memory["PPO"]
    auto = AutoModelForSeq2SeqLM if family in PAIRED else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(settings)
    assert found["SFT"].parameters == sum(each.numel() for each in model.parameters())


@pytest.mark.slow
def test_a_gpu_without_bfloat16_computes_in_float32(tmp_path):
    CAUSAL["GPT-2"].save_pretrained(tmp_path)
    with_bf16, without = (next(compare([str(tmp_path)], hardware(gpu), 64)).memory for gpu in ("RTX3090", "V100-32GB"))
    assert with_bf16 < without


@pytest.mark.slow
def test_what_cannot_be_laid_out_is_said(tmp_path):
    MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="SFT: there is no plan for this model.*num_attention_heads.*a run may"):
        next(compare([str(tmp_path)], hardware("24GB"), 64))


def test_an_encoder_is_no_language_model():
    with pytest.raises(ConfigError, match="'microsoft/deberta-v3-base' is no language model"):
        next(compare(["microsoft/deberta-v3-base"], hardware("24GB"), 64))
