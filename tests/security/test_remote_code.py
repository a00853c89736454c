"""Code that comes with a model runs where trust_remote_code asks for it, and nowhere else."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hostile import line_about
from tiny import llama, tokenizer

from chatrlhf import load_reward_model
from chatrlhf.config.schema import ActorConfig, RewardConfig
from chatrlhf.models.for_stages import load_actor
from chatrlhf.models.loading.pretrained import load_backbone, load_language_model, read_model_config
from chatrlhf.models.loading.sequence_classifier import load_sequence_classifier
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.tools.export.merge import merge
from chatrlhf.tools.export.quantize import Asked, quantize

KEY = "actor_config.model"
CODE = """
import os
os.mkdir({proof!r})
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoModelForSeq2SeqLM": "evil.EvilModel",
    "AutoModelForSequenceClassification": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """Where transformers would copy a model's code to."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever asks on the terminal is told yes


@pytest.fixture
def proof(tmp_path):
    return tmp_path / "proof"


@pytest.fixture
def model(tmp_path, proof):
    """A model whose configuration and tokenizer name code beside the weights; its own family is not known."""
    folder = tmp_path / "model"
    llama(vocab=270).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "evil.py").write_text(CODE.format(proof=str(proof)))
    edit(folder / "config.json", model_type="evil", auto_map=CLASSES)
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=CLASSES)
    return folder


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def quantized(folder):
    asked = dict(model=folder, output=folder.parent / "out", method="nf4", text=folder / "config.json")
    fields = {name: asked.get(name) for name in Asked.__dataclass_fields__}
    return quantize(SimpleNamespace(**fields), print)


LOADS = {
    "configuration": lambda folder: read_model_config(str(folder), KEY),
    "configuration of a section": lambda folder: read_model_config(str(folder), KEY, ActorConfig(model=str(folder))),
    "language model": lambda folder: load_language_model(str(folder), KEY),
    "backbone": lambda folder: load_backbone(str(folder), KEY),
    "actor": lambda folder: load_actor(ActorConfig(model=str(folder)), [], "cpu"),
    "tokenizer": lambda folder: load_tokenizer(str(folder), KEY),
    "classifier": lambda folder: load_sequence_classifier(str(folder), KEY, RewardConfig(model=str(folder))),
    "reward model": lambda folder: load_reward_model(folder),
    "export quantize": quantized,
}


@pytest.mark.parametrize("what", LOADS)
def test_a_models_code_does_not_run(model, proof, what):
    line_about(lambda: LOADS[what](model))
    assert not proof.exists()


@pytest.mark.parametrize("what", ["language model", "backbone"])
def test_a_known_family_is_loaded_without_its_code(model, proof, what):
    edit(model / "config.json", model_type="llama")
    LOADS[what](model)
    assert not proof.exists()


def test_a_tokenizer_of_a_known_class_is_loaded_without_its_code(model, proof):
    edit(model / "config.json", model_type="llama")
    edit(model / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    load_tokenizer(str(model), KEY)
    assert not proof.exists()


def test_adapters_over_such_a_base_do_not_run_it(model, proof, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "task_type": "CAUSAL_LM"}
    settings["auto_mapping"] = {"base_model_class": "EvilModel", "parent_library": "evil"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    line_about(lambda: load_language_model(str(folder), KEY))
    line_about(lambda: merge(folder, tmp_path / "out", None, print))
    assert not proof.exists()


@pytest.mark.parametrize("what", ["configuration", "language model", "backbone", "classifier", "actor"])
def test_kernels_that_a_configuration_names_are_not_fetched(tmp_path, monkeypatch, what):
    folder = tmp_path / "model"
    llama(vocab=270).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    edit(folder / "config.json", attn_implementation="evil/kernel", _attn_implementation="evil/kernel:run")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it was fetched"))
    assert "kernels of the hub (evil/kernel" in line_about(lambda: LOADS[what](folder))


def test_the_code_runs_where_the_key_asks_for_it(model, proof):
    """Or the others would prove nothing."""
    edit(model / "config.json", auto_map={"AutoConfig": "evil.EvilConfig"})
    read_model_config(str(model), KEY, ActorConfig(model=str(model), trust_remote_code=True))
    assert proof.is_dir()
