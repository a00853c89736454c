"""Adapters of a peft folder: what it holds is restored, as peft restores it, or refused by its name."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from field_reports import report
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import flan_t5, gpt2, llama, qwen2, t5, tokenizer
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaForSequenceClassification

from chatrlhf.errors import ConfigError, UserError
from chatrlhf.models.loading.adapter_loading import continue_adapters
from chatrlhf.models.loading.backbone import read_by
from chatrlhf.models.loading.lora import merged_parameters
from chatrlhf.models.loading.pretrained import load_base_model, load_language_model
from chatrlhf.tools.export.delta import apply_delta, make_delta
from chatrlhf.tools.export.merge import merge
from chatrlhf.tools.export.weights import Weights

IDS = torch.arange(20)[None]
FILE, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
TIED = {"tie_word_embeddings": True}


def lora(*targets: str, kind: str = "CAUSAL_LM", **settings) -> LoraConfig:
    targets = targets or ("q_proj", "v_proj")
    return LoraConfig(task_type=kind, r=4, lora_alpha=12, target_modules=list(targets), **settings)


def saved(folder: Path, model, config, more_tokens: int = 0, kind=None):
    """Base and adapters, which change something, in folders, and the model with them."""
    model.eval().save_pretrained(folder / "base")
    model = (kind or type(model)).from_pretrained(folder / "base").eval()
    if more_tokens:
        model.resize_token_embeddings(24 + more_tokens)
    wrapped = get_peft_model(model, config).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in wrapped.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn(weight.shape))
    wrapped.peft_config["default"].base_model_name_or_path = str(folder / "base")
    wrapped.save_pretrained(folder / "adapters")
    return wrapped


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(**read_by(model.config, IDS)).logits


def refusal(load, *arguments) -> str:
    """The one line that a load is refused by."""
    with pytest.raises(UserError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def apart(folder: Path):
    """As RL loads them with peft_enable."""
    model = load_base_model(str(folder), "k")
    continue_adapters(model, folder)
    return model


# What of them stays apart from the base's weights in RL; of the others the name under which they are refused there.
KINDS = {
    "LoRA": (llama, lora(), None),
    "rank-stabilized": (llama, lora(use_rslora=True), None),
    "ranks by layer": (llama, lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}), None),
    "one layer": (llama, lora(layers_to_transform=[1]), None),
    "GPT-2": (gpt2, lora("c_attn", fan_in_fan_out=True), None),
    "T5": (t5, lora("q", "v", kind="SEQ_2_SEQ_LM"), None),
    "T5's tied head": (t5, lora("q", "lm_head", kind="SEQ_2_SEQ_LM"), None),
    "tied, head": (lambda: llama(**TIED), lora("q_proj", "lm_head"), None),
    "tied, embeddings": (lambda: llama(**TIED), lora("q_proj", "embed_tokens"), None),
    "GPT-2's tied embeddings": (gpt2, lora("c_attn", "wte"), None),
    "DoRA": (llama, lora(use_dora=True), r"use_dora \(True\)"),
    "biases": (qwen2, lora(bias="all"), r"bias \(all\)"),
    "bias of LoRA": (qwen2, lora("q_proj", lora_bias=True), "lora_bias"),
    "PiSSA": (llama, lora(init_lora_weights="pissa"), r"init_lora_weights \(pissa\)"),
    "head": (llama, lora(modules_to_save=["lm_head"]), r"modules_to_save \(\['lm_head'\]\)"),
    "norms": (llama, lora(modules_to_save=["norm"]), "modules_to_save"),
    "tied, whole embeddings": (lambda: llama(**TIED), lora(modules_to_save=["embed_tokens"]), "modules_to_save"),
    "tied, whole head": (lambda: llama(**TIED), lora(modules_to_save=["lm_head"]), "modules_to_save"),
    "rows of tokens": (llama, lora(trainable_token_indices=[1, 5]), "trainable_token_indices"),
    "tied, rows of tokens": (lambda: llama(**TIED), lora(trainable_token_indices=[1, 5]), "trainable_token_indices"),
    "IA3": (
        llama,
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        "peft_type IA3",
    ),
    "LoHa": (llama, LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), "peft_type LOHA"),
}


@report(
    "no report (`load_adapter` of transformers restores neither modules_to_save nor DoRA's magnitudes)",
    fault="adapters with DoRA, whole heads, biases, rows of tokens, tied heads, other types than LoRA: a part is lost, "
    "or merged into two places, in silence",
    expected="merged: logits of peft's own loading, before and after saving; apart, in RL: the same, or refused",
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_adapters_hold_is_restored_or_refused_by_name(tmp_path, kind):
    make, config, named = KINDS[kind]
    wanted = logits(saved(tmp_path, make(), config))
    folder, near = tmp_path / "adapters", {"rtol": 0, "atol": 1e-4 * wanted.std().item()}
    merged = load_language_model(str(folder), "k")
    torch.testing.assert_close(logits(merged), wanted, **near)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path / "merged")), wanted, **near)
    if named is None:
        torch.testing.assert_close(logits(apart(folder)), wanted, **near)
    else:
        assert re.search(f"these adapters hold {named}.*export merge --model {folder}", refusal(apart, folder))


@report(
    "hiyouga/LlamaFactory#3125",
    "huggingface/peft#2898",
    "unslothai/unsloth#978",
    fault="adapters that were trained with added tokens, or on a base without its padding rows, and hold embeddings of "
    "that size: a traceback about shapes",
    expected="the base gets the rows of the adapters; where a row is in neither, one line says so",
)
@pytest.mark.parametrize("more", [2, -4])
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (TIED, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (TIED, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        ({}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        ({}, {}),  # peft saves the embeddings by itself where it finds that they were resized
    ],
    ids=["whole", "whole, tied", "whole, kept tied", "factors", "by peft itself"],
)
def test_the_base_gets_the_rows_of_added_tokens(tmp_path, more, options, settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj"]} | settings)
    wrapped = saved(tmp_path, llama(**options), config, more)
    tokenizer().save_pretrained(tmp_path / "adapters")
    merge(tmp_path / "adapters", tmp_path / "merged", torch.float32, print)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert ours.config.vocab_size == 24 + more
    ids = torch.arange(24 + more)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(ids).logits, wrapped(ids).logits, rtol=0, atol=1e-4)
    assert re.search(
        "these adapters hold (modules_to_save|whole tensors that differ)", refusal(apart, tmp_path / "adapters")
    )


def test_rows_that_are_nowhere_are_named(tmp_path):
    """Of the added tokens the embeddings are in the file, and the head's rows are not."""
    saved(tmp_path, llama(), lora(modules_to_save=["embed_tokens"]), 2)
    path = tmp_path / "adapters" / FILE
    save_file({name: value for name, value in load_file(path).items() if "lm_head" not in name}, path)
    line = refusal(load_language_model, str(tmp_path / "adapters"), "k")
    assert "were trained with added tokens, whose rows of lm_head are neither in them nor in their base" in line


def edited(change):
    """A damage: the file holds what ``change`` makes of its tensors."""
    return lambda folder: save_file(change(load_file(folder / FILE)), folder / FILE)


def configured(**values):
    def apply(folder: Path) -> None:
        settings = json.loads((folder / SETTINGS).read_text())
        (folder / SETTINGS).write_text(json.dumps(settings | values))

    return apply


def on_another_base(**sizes):
    return lambda folder: llama(**sizes).save_pretrained(folder.parent / "base")


DAMAGES = {
    "git-lfs pointer": (lambda f: (f / FILE).write_text("version https://git-lfs.github.com/spec/v1"), "git lfs pull"),
    "cut short": (lambda f: (f / FILE).write_bytes((f / FILE).read_bytes()[:3000]), "is damaged or cut short"),
    "empty": (lambda f: (f / FILE).write_bytes(b""), r"is empty \(0 bytes\)"),
    "no weights": (lambda f: (f / FILE).unlink(), f"holds {SETTINGS} and neither of adapter_model.safetensors, "),
    "a factor is missing": (edited(lambda w: dict(list(w.items())[1:])), "the file lacks 1 tensor that adapter_config"),
    "names of a wrapper": (
        edited(lambda w: {f"module.{n}": value for n, value in w.items()}),
        "match nothing in their",
    ),
    "a renamed module": (
        edited(lambda w: {name.replace("q_proj", "query"): value for name, value in w.items()}),
        "4 tensors of the adapters match nothing",
    ),
    "a tensor beside": (
        edited(lambda w: w | {"base_model.model.score.weight": torch.ones(1, 16)}),
        "a classifier's head|whole tensors that differ from",
    ),
    "NaN": (edited(lambda w: {name: value * torch.nan for name, value in w.items()}), "NaN or infinite values in 8"),
    "another rank": (configured(r=8), r"is \[4, 16\] in the file and \[8, 16\] on the base, and 7 more"),
    "other layers": (configured(target_modules=["c_attn"]), "cannot be loaded on their base .*not found in the base"),
    "a wider base": (on_another_base(width=32), r"is \[4, 16\] in the file and \[4, 32\] on the base"),
    "a base of one layer": (on_another_base(num_hidden_layers=1), "4 tensors of the adapters match nothing"),
    "a type of someone's own": (configured(peft_type="MINE"), "cannot be loaded on their base"),
    "no base": (
        configured(base_model_name_or_path=None),
        "base_model_name_or_path is null, .* write its folder or hub",
    ),
    "a base that is gone": (
        configured(base_model_name_or_path="/no/where"),
        "base of the adapters in .*'/no/where' cannot",
    ),
    "itself as base": (lambda f: configured(base_model_name_or_path=str(f))(f), "the folder of the adapters itself"),
    "settings cut short": (lambda f: (f / SETTINGS).write_text('{"r": 4'), f"{SETTINGS}, line 1: cannot be read"),
    "settings in a list": (lambda f: (f / SETTINGS).write_text("[]"), "holds a list, not the settings of adapters"),
    "repeated layers": (configured(layer_replication=[[0, 2], [1, 2]]), "layer_replication.*not supported"),
    "a base without a norm": (
        lambda f: save_file(
            {n: v for n, v in load_file(f.parent / "base" / "model.safetensors").items() if n != "model.norm.weight"},
            f.parent / "base" / "model.safetensors",
            {"format": "pt"},
        ),
        "the base of the adapters in .* lacks 1 of 21 tensors",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    saved(folder, llama(), lora())
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_refused_by_one_line(sound, tmp_path, damage):
    apply, words = DAMAGES[damage]
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    configured(base_model_name_or_path=str(tmp_path / "base"))(tmp_path / "adapters")
    apply(tmp_path / "adapters")
    for load in (
        lambda folder: load_language_model(str(folder), "k"),
        apart,
        lambda f: merge(f, f / "out", torch.float32, print),
    ):
        line = refusal(load, tmp_path / "adapters")
        assert re.search(words, line) and str(tmp_path / "adapters") in line, line


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
        lora(alora_invocation_tokens=[3, 4]),
    ],
    ids=lambda config: type(config).__name__,
)
def test_adapters_that_cannot_be_merged_are_refused_by_name(tmp_path, config):
    saved(tmp_path, llama(), config)
    line = refusal(load_language_model, str(tmp_path / "adapters"), "k")
    assert re.search("PROMPT_TUNING|PREFIX_TUNING|ranknum|aLoRA", line) and str(tmp_path / "adapters") in line


def test_embeddings_that_encoder_and_decoder_share_are_not_merged(tmp_path):
    saved(tmp_path, flan_t5(), lora("q", "shared", kind="SEQ_2_SEQ_LM"), kind=AutoModelForSeq2SeqLM)
    assert "encoder and decoder have under other names" in refusal(load_language_model, str(tmp_path / "adapters"), "k")


def test_adapters_of_a_classifier_are_no_actor(tmp_path):
    saved(tmp_path, llama(), lora(kind="SEQ_CLS"), kind=LlamaForSequenceClassification)
    line = refusal(load_language_model, str(tmp_path / "adapters"), "k")
    assert "match nothing in their base (base_model.model.score.weight): a classifier's head" in line


def test_a_merge_that_computes_something_else_is_refused(sound, monkeypatch):
    from peft.tuners.lora import LoraModel

    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())  # without what they add
    assert "compute something else than apart" in refusal(load_language_model, str(sound / "adapters"), "k")


def test_weights_of_a_tied_head_with_adapters_are_not_sent_elsewhere(tmp_path):
    saved(tmp_path, llama(**TIED), lora("q_proj", "lm_head"))
    with pytest.raises(ConfigError, match="target_modules reach embeddings or head, which are tied"):
        merged_parameters(apart(tmp_path / "adapters"))


@report(
    "no report (found while testing deltas)",
    fault="`export apply-delta` refuses the delta's own base where that lies as pytorch_model.bin, with its tied head "
    "under a second name, or the other way",
    expected="the target, bit for bit",
)
@pytest.mark.parametrize("first", ["safetensors", "bin"])
def test_a_delta_knows_its_base_in_either_kind_of_file(tmp_path, first):
    base, target = llama(seed=0, **TIED), llama(seed=1, **TIED)
    base.save_pretrained(tmp_path / "safetensors")
    shutil.copytree(tmp_path / "safetensors", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(base.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    for form in ("safetensors", "bin"):
        target.save_pretrained(tmp_path / f"target-{form}")
    torch.save(target.state_dict(), tmp_path / "target-bin" / "pytorch_model.bin")
    (tmp_path / "target-bin" / "model.safetensors").unlink()
    other = {"safetensors": "bin", "bin": "safetensors"}[first]
    for form in ("safetensors", "bin"):
        make_delta(tmp_path / first, tmp_path / f"target-{form}", tmp_path / f"delta-{form}")
        apply_delta(tmp_path / other, tmp_path / f"delta-{form}", tmp_path / f"again-{form}", print)
        wanted = Weights(tmp_path / f"target-{form}", "k").sha256()
        assert Weights(tmp_path / f"again-{form}", "k").sha256() == wanted
    line = refusal(apply_delta, tmp_path / "target-bin", tmp_path / "delta-bin", tmp_path / "x", print)
    assert "is not the base that this delta was made from" in line
