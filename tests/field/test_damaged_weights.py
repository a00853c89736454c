"""Weight files that are damaged, renamed, partial or of another model: each is refused by one line, none is loaded."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from families import CAUSAL
from field_reports import report
from safetensors.torch import load_file, save_file
from tiny import llama, tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

from chatrlhf.config.schema import Config, RewardConfig
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import UserError
from chatrlhf.models.classifier import load_classifier
from chatrlhf.models.loading.pretrained import load_backbone, load_language_model
from chatrlhf.models.loading.quantization import quantization_from
from chatrlhf.models.reward_model import HEAD, SETTINGS, RewardModel, RewardScorer, load_reward_model
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.preflight import check_settings
from chatrlhf.tools.export.quantize import Asked, quantize
from chatrlhf.tools.export.weights import Weights
from chatrlhf.tools.synth.llm.local_model import LocalModel

CPU = torch.device("cpu")
WEIGHTS, CONFIG = "model.safetensors", "config.json"
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


def edit_weights(edit):
    """A damage: the file holds what ``edit`` makes of its tensors."""

    def apply(folder: Path) -> None:
        weights = edit(load_file(folder / WEIGHTS))
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})

    return apply


def renamed(change):
    return edit_weights(lambda weights: {change(name): value for name, value in weights.items()})


def without(part: str):
    return edit_weights(lambda weights: {name: value for name, value in weights.items() if part not in name})


def put(name: str, change):
    return edit_weights(lambda weights: weights | {name: change(weights.get(name))})


def configured(**values):
    def apply(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | values))

    return apply


def content(change):
    """A damage: the file holds the bytes that ``change`` makes of its own."""
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def in_pytorchs_file(change):
    """A damage: the weights are in pytorch_model.bin, as what ``change`` makes of them, an object or bytes."""

    def apply(folder: Path) -> None:
        changed = change(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).unlink()
        path = folder / "pytorch_model.bin"
        path.write_bytes(changed) if isinstance(changed, bytes) else torch.save(changed, path)

    return apply


def in_shards(damage):
    def apply(folder: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder, max_shard_size="8KB")
        damage(folder / f"{WEIGHTS}.index.json", sorted(folder.glob("model-*")))

    return apply


def without_a_shard_in_the_index(index: Path, shards: list[Path]) -> None:
    listed = json.loads(index.read_text())
    kept = {name: file for name, file in listed["weight_map"].items() if file != shards[1].name}
    index.write_text(json.dumps(listed | {"weight_map": kept}))


DAMAGES = {
    # names
    "torch.compile": (renamed("_orig_mod.{}".format), r"lacks 21 of 21 .* carry '_orig_mod.', put there by torch.comp"),
    "DDP": (renamed("module.{}".format), "carry 'module.', put there by DDP or DeepSpeed; save the model inside"),
    "peft, saved whole": (renamed("base_model.model.{}".format), "carry 'base_model.model.', put there by peft; save"),
    "value-head wrapper": (renamed("pretrained_model.{}".format), "carry 'pretrained_model.', put there by TRL"),
    "blocks compiled": (renamed(lambda n: n.replace(".mlp", "._orig_mod.mlp")), "lacks 6 of .*carry '_orig_mod.'"),
    "FSDP": (renamed(lambda n: n.replace("layers.1", "layers.1._fsdp_wrapped_module")), "'_fsdp_wrapped_module.'"),
    "a prefix of someone's own": (renamed("policy.{}".format), "names in the file begin with 'policy.'; remove that"),
    "a state dict in a checkpoint": (in_pytorchs_file(lambda w: {"state_dict": w, "step": 3}), "under 'state_dict'"),
    # tensors that are missing
    "an MLP": (without("layers.1.mlp"), r"lacks 3 of 21 tensors of a LlamaForCausalLM \(model.layers.1.mlp.down_proj"),
    "the head": (without("lm_head"), r"lacks 1 of 21 .*\(lm_head.weight\).* saved with its language modeling head"),
    "the embeddings": (without("embed_tokens"), "lacks 1 of 21"),
    "a norm": (without("input_layernorm"), "lacks 2 of 21"),
    "a shard that the index leaves out": (in_shards(without_a_shard_in_the_index), "lacks 7 of 21"),
    "a shard that is another's copy": (in_shards(lambda _, shards: shutil.copy(shards[0], shards[1])), "lacks 7 of 21"),
    # configurations of another model
    "another width": (
        configured(intermediate_size=48),
        r"6 tensors of another .* is \[16, 32\] in the file and \[16, 48",
    ),
    "more layers": (configured(num_hidden_layers=3), "lacks 9 of 30 tensors"),
    "fewer layers": (configured(num_hidden_layers=1), "holds 9 tensors that a LlamaForCausalLM does not have"),
    "more tokens": (configured(vocab_size=30), r"lm_head.weight is \[24, 16\] in the file and \[30, 16\] by config"),
    "another family": (configured(model_type="gpt2"), "lacks .* tensors of a GPT2LMHeadModel"),
    "a number in words": (configured(hidden_size="16x"), "cannot be loaded, .*'hidden_size' expected int"),
    "no heads": (configured(num_attention_heads=0), "cannot be loaded, .*ZeroDivisionError"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "cannot be loaded"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "cannot be loaded, .*not a valid JSON"),
    # tensors that are others
    "transposed": (put(UP, lambda w: w.T), r"up_proj.weight is \[16, 32\] in the file and \[32, 16\] by config.json"),
    "a number": (put(NORM, lambda w: torch.tensor(1.0)), r"norm.weight is \[\] in the file"),
    "a bias that the model has not": (
        put(UP.replace("weight", "bias"), lambda _: torch.ones(32)),
        "holds 1 tensor that",
    ),
    "8 bits, scales beside": (put(UP.replace("weight", "SCB"), lambda _: torch.ones(32)), "SCB.*would not compute"),
    "integers": (put(NORM, lambda w: w.to(torch.int64)), "holds integers in 1 tensor .*no quantization_config"),
    "NaN": (put(UP, lambda w: w.index_fill(0, torch.tensor(3), torch.nan)), "has NaN or infinite values in 1 tensor"),
    "infinite": (put(NORM, lambda w: w / 0), "has NaN or infinite values in 1 tensor"),
    # files
    "git-lfs pointer": (
        content(lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "run git lfs pull",
    ),
    "cut short": (content(lambda old: old[:5000]), r"model.safetensors is damaged or cut short \(5,000 bytes"),
    "empty": (content(lambda _: b""), r"model.safetensors is empty \(0 bytes\); copy or download it again"),
    "zeros": (content(lambda old: bytes(len(old))), "is damaged or cut short"),
    "a page that says: not found": (content(lambda _: b"<html>Not Found</html>"), "is damaged or cut short"),
    "garbage": (in_pytorchs_file(lambda _: b"PK\x03\x04 no zip"), "pytorch_model.bin is damaged or cut short"),
    "text": (in_pytorchs_file(lambda _: b"hello\n"), "pytorch_model.bin is .*damaged"),
    "PyTorch's file, empty": (in_pytorchs_file(lambda _: b""), r"pytorch_model.bin is empty"),
    "objects that run code": (in_pytorchs_file(lambda w: {**w, "path": Path("x")}), "holds other objects than tensors"),
    "a list of tensors": (in_pytorchs_file(lambda w: list(w.values())), "holds a list, not a dictionary"),
    "a shard is not there": (in_shards(lambda _, shards: shards[1].unlink()), "names model-00002-of-.* not there"),
    "an index that is no JSON": (in_shards(lambda index, _: index.write_text("{")), "is no list of shards"),
    "an index of nothing": (in_shards(lambda index, _: index.write_text("{}")), "is no list of shards"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "cannot be loaded, it is a folder without a usable"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "base"
    llama().save_pretrained(folder)
    return folder


@pytest.fixture
def base(sound, tmp_path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "base"))


def refusal(load, *arguments) -> str:
    """The one line that a load is refused by."""
    with pytest.raises(UserError) as error:
        load(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@report(
    "pytorch/pytorch#101107",
    "huggingface/transformers#48722",
    "huggingface/transformers#27923",
    fault="44 damaged, renamed or partial weight files and configurations of another model (`_orig_mod.`, `module.`, a "
    "missing layer, a git-lfs pointer, ...): random weights in silence, or a traceback",
    expected="none is loaded: one line names the folder, the tensors or the file, and the remedy",
)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights_are_refused_by_one_line(base, damage):
    apply, words = DAMAGES[damage]
    apply(base)
    line = refusal(load_language_model, str(base), "actor_config.model")
    assert line.startswith(f"actor_config.model: '{base}' ")
    assert re.search(words, line), line


def encoder() -> Encoder:
    return Encoder(tokenizer(), FORMATS["raw"], 64)


def saved(model, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def classifier(folder: Path) -> Path:
    config = LlamaConfig(**llama().config.to_dict() | {"num_labels": 1})
    tokenizer().save_pretrained(folder)
    return saved(LlamaForSequenceClassification(config), folder)


# Every way to weights but `load_language_model`, with what is refused of a model that lacks the norm behind its blocks.
LOADS = {
    "a critic's or reward model's start": lambda folder: load_backbone(str(folder), "critic_config.model"),
    "4 bits": lambda folder: load_backbone(str(folder), "k", None, quantization_from({"load_in_4bit": True}, "k")),
    "synth and chat": lambda folder: LocalModel(str(folder)),
    "quantize": lambda folder: quantize(
        Asked(folder, folder / "out", "int8", None, text(folder), windows=1, context=8)
    ),
    "a classifier": lambda folder: load_classifier(RewardConfig(model=str(folder)), CPU),
    "a trained reward model": load_reward_model,
}


def text(folder: Path) -> Path:
    (folder / "text.txt").write_text("the cat sat on the mat " * 20)
    return folder / "text.txt"


@pytest.mark.parametrize("load", LOADS)
def test_every_way_to_weights_asks_what_is_missing(tmp_path, load):
    folder = classifier(tmp_path / "base") if load == "a classifier" else saved(llama(vocab=270), tmp_path / "base")
    tokenizer().save_pretrained(folder)
    if load == "a trained reward model":
        RewardScorer(RewardModel(llama(vocab=270).base_model, ScalarHead(16)), encoder()).save(folder)
    without("norm.weight")(folder)
    assert re.search(r"lacks \d of \d\d tensors of a .*norm.weight", refusal(LOADS[load], folder))


@report(
    "OpenRLHF/OpenRLHF#643",
    fault="a reward model whose file lacks the score head, or holds a damaged one: scores of a random head",
    expected="refused by one line that names head and folder",
)
def test_a_reward_models_head_is_the_one_that_was_trained(tmp_path):
    folder = classifier(tmp_path / "classifier")
    without("score.weight")(folder)
    assert "lacks 1 of 21 tensors" in refusal(load_classifier, RewardConfig(model=str(folder)), CPU)
    scorer = RewardScorer(RewardModel(llama(vocab=270).base_model, ScalarHead(16)), encoder())
    damages = {
        "is empty": lambda path: path.write_bytes(b""),
        "is not there, or is no file": lambda path: path.unlink(),
        "does not fit": lambda path: save_file({"linear.weight": torch.ones(1, 16)}, path),
        "has NaN": lambda path: save_file({n: t * torch.nan for n, t in load_file(path).items()}, path),
    }
    for words, damage in damages.items():
        scorer.save(tmp_path / "reward")
        damage(tmp_path / "reward" / HEAD)
        line = refusal(load_reward_model, tmp_path / "reward")
        assert words in line and str(tmp_path / "reward") in line
    scorer.save(tmp_path / "reward")
    (tmp_path / "reward" / SETTINGS).write_text('{"mlp_size": null}')
    assert "lacks pooling, scale, shift, max_length" in refusal(load_reward_model, tmp_path / "reward")


def test_an_expert_that_is_missing_is_named(tmp_path):
    folder = saved(AutoModelForCausalLM.from_config(CAUSAL["Mixtral"]), tmp_path / "base")
    without("layers.0.block_sparse_moe.experts.3.w1")(folder)
    line = refusal(load_language_model, str(folder), "k")
    assert "the tensors that make up model.layers.0.mlp.experts.gate_up_proj are incomplete" in line


def test_another_size_is_found_in_4_bits_too(base):
    configured(intermediate_size=48)(base)
    four_bits = quantization_from({"load_in_4bit": True}, "k")
    assert "6 tensors of another shape" in refusal(load_language_model, str(base), "k", None, four_bits)


def test_a_classifier_is_no_actor(tmp_path):
    line = refusal(load_language_model, str(classifier(tmp_path / "base")), "actor_config.model")
    assert "lacks 1 of 21 tensors" in line and "it holds score.weight instead, the head of another task" in line


def test_damaged_files_are_found_before_the_first_stage(base, tmp_path, monkeypatch):
    """The critic's, for one, would be read after hours."""
    content(lambda old: old[:5000])(base)
    sections = {"actor_config": {"model": "tiny"}, "reward_config": {"reward_fn": "math:fsum"}}
    config = Config(**sections, critic_config={"model": str(base)}, trainer_config={"examples_path": "x"})
    line = refusal(check_settings, config, ["RL"], True, tmp_path)
    assert line.startswith(f"critic_config.model: '{base}' cannot be loaded: model.safetensors is damaged")


def test_weights_of_a_delta_are_looked_at_first(base):
    content(lambda old: old[:5000])(base)
    assert "--base: the weights in" in refusal(Weights, base, "--base")
