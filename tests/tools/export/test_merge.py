"""Adapters into weights: any tool loads what comes out, and it computes what base and adapters do."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraModel
from tiny import gpt2, llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatrlhf.cli import main
from chatrlhf.config.model import RopeScaling
from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.models.loading.lora import BASE_CONFIG
from chatrlhf.models.loading.rope import stretch_positions
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.export.merge import merge


@pytest.fixture
def adapted(tmp_path):
    """Adapters that change something, scaled by other than 1, in a folder; and the model with them."""

    def make(model, targets):
        model.eval().save_pretrained(tmp_path / "base")
        torch.manual_seed(5)
        config = LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM")
        wrapped = get_peft_model(model, config).eval()
        with torch.no_grad():
            for name, weight in wrapped.named_parameters():
                if "lora_" in name:
                    weight.copy_(0.2 * torch.randn(weight.shape))
        wrapped.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        wrapped.save_pretrained(tmp_path / "adapters")
        train_tokenizer(["a"], 258).save_pretrained(tmp_path / "adapters")
        (tmp_path / "adapters" / "chat_template.jinja").write_text("{{ messages }}")
        return tmp_path / "adapters", wrapped

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["q_proj", "down_proj"]), (gpt2, ["c_attn"])], ids=["llama", "gpt2 (transposed)"]
)
def test_what_is_merged_computes_what_base_and_adapters_do(adapted, tmp_path, make, targets, dtype):
    adapters, wrapped = adapted(make() if make is llama else gpt2(), targets)
    compared = merge(adapters, tmp_path / "merged", dtype, print)
    ids = torch.arange(20)[None]
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    with torch.no_grad():
        expected, found, plain = wrapped(ids).logits, merged(ids).logits, base(ids).logits
    bound = 1e-4 if dtype is torch.float32 else 0.1
    assert (found - expected).abs().max() < bound * expected.std()
    assert (found - plain).abs().max() > 0.5 * expected.std()
    assert compared.difference < bound * compared.spread
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == "{{ messages }}"


def test_stretched_positions_beside_the_adapters_go_with_them(adapted, tmp_path):
    adapters, wrapped = adapted(llama(), ["q_proj"])
    stretch_positions(wrapped.config, RopeScaling(type="linear", factor=4), "k")
    wrapped.config.to_json_file(adapters / BASE_CONFIG)
    merge(adapters, tmp_path / "merged", torch.float32, print)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.rope_parameters["factor"] == 4


def test_a_base_that_is_stretched_otherwise_is_named(adapted, tmp_path, capsys):
    base = llama()
    stretch_positions(base.config, RopeScaling(type="linear", factor=2), "k")
    adapters, wrapped = adapted(base, ["q_proj"])
    stretch_positions(wrapped.config, RopeScaling(type="linear", factor=4), "k")
    wrapped.config.to_json_file(adapters / BASE_CONFIG)
    assert main(["export", "merge", "--model", str(adapters), "--output", str(tmp_path / "merged")]) == 0
    out = capsys.readouterr().out
    assert f"warning: {adapters}: its adapters were trained on rotary positions 'linear' (factor 4" in out


def test_the_base_is_fetched_in_the_revision_that_the_adapters_name(adapted, tmp_path, monkeypatch):
    adapters, _ = adapted(llama(), ["q_proj"])
    config = adapters / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"revision": "v2"}))
    asked, usual = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k.get("revision")) or usual(*a, **k)
    )
    merge(adapters, tmp_path / "merged", torch.float32, print)
    assert asked == ["v2"]


def test_a_merge_that_computes_something_else_is_not_written(adapted, tmp_path, monkeypatch):
    adapters, _ = adapted(llama(), ["q_proj"])
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())  # without what they add
    with pytest.raises(CheckpointError, match="too much for rounding"):
        merge(adapters, tmp_path / "merged", torch.float32, print)
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_merged(adapted, tmp_path, capsys):
    adapters, _ = adapted(llama(), ["q_proj"])
    with pytest.raises(ConfigError, match="holds no adapters"):
        merge(tmp_path / "base", tmp_path / "merged", torch.float32, print)
    config = adapters / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "gone")}))
    command = ["export", "merge", "--model", str(adapters), "--output"]
    assert main([*command, str(tmp_path / "merged")]) == 2
    assert "gone" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "base")]) == 2
    config.write_text(json.dumps(values))
    assert main([*command, str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    assert "its logits differ from" in capsys.readouterr().out
