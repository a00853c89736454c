"""Quantized models: they load as any other, are near what they were, and GPTQ looks at the rows it is given."""

from __future__ import annotations

import json

import pytest
import torch
from published import shrink
from safetensors import safe_open
from tiny import bloom, gpt2, gpt_neox, llama, opt, qwen2
from transformers import AutoModelForCausalLM, AutoTokenizer

from chatrlhf.cli import main
from chatrlhf.data.templates import FORMATS
from chatrlhf.errors import ConfigError, DataError
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.tools.export.provenance import ORIGIN
from chatrlhf.tools.export.quantize import Asked, quantize

TEXT = "the cat sat on the mat, and the hat of the cat is on the mat. " * 60
STRETCHED = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}


@pytest.fixture
def folder(tmp_path):
    """A model with positions stretched, its tokenizer and template, and a text."""
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = train_tokenizer([TEXT], 280)
    sizes = dict(width=128, intermediate_size=256, num_attention_heads=4)
    model = llama(vocab=len(tokenizer), rope_parameters=dict(STRETCHED), **sizes)
    shrink(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    FORMATS["chatllama"].save(tmp_path / "model")
    # As Llama-2-chat's: transformers loads it, and refuses to save it.
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [0, 1], "temperature": 0.9}')
    return tmp_path


def asked(folder, method="gptq", **options) -> Asked:
    given = dict(calibration=folder / "text.txt" if method == "gptq" else None, text=folder / "text.txt")
    given |= dict(samples=16, length=32, context=64, windows=8, dtype=torch.float32)
    return Asked(folder / "model", folder / "out", method, **given | options)


def logits(path, ids) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits.float()


def unpacked(path):
    """A model whose integers have become weights, which happens with its first forward."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        model(torch.arange(8)[None])
    return model


def bound(method: str) -> float:
    return 0.1 if method == "int8" else 0.5


@pytest.mark.parametrize("method", [pytest.param("gptq", marks=pytest.mark.slow), "nf4", "int8"])
def test_what_is_written_loads_and_is_near_what_it_was(folder, method):
    found = quantize(asked(folder, method))
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder / "out")(TEXT).input_ids[:60])[None]
    before, after = logits(folder / "model", ids), logits(folder / "out", ids)
    assert 0 < (after - before).square().mean().sqrt() < bound(method) * before.std()
    assert found.after.perplexity[64] == pytest.approx(found.before.perplexity[64], rel=0.3)
    assert found.after.perplexity != found.before.perplexity
    assert found.bytes_after < found.bytes_before * (0.55 if method == "int8" else 0.45)  # embeddings stay whole
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["rope_parameters"] == STRETCHED
    assert (folder / "out" / "chat_template.jinja").read_text() == FORMATS["chatllama"].source
    generation = json.loads((folder / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 1] and generation["do_sample"] and generation["temperature"] == 0.9
    step = json.loads((folder / "out" / ORIGIN).read_text())["steps"][-1]
    assert step["of"] == "model" and list(step["perplexity"].values())[1] == found.after.perplexity[64]


@pytest.mark.slow
def test_gptq_has_four_bits_in_groups_and_follows_the_activations(folder):
    quantize(asked(folder))
    scheme = json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    (group,) = scheme["config_groups"].values()
    weights = group["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["actorder"]) == (4, 128, "weight")
    with safe_open(folder / "out" / "model.safetensors", "pt") as file:
        packed = [name for name in file.keys() if name.endswith("weight_packed")]  # noqa: SIM118
        assert len(packed) == 14 and "lm_head.weight" not in packed
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_packed").shape == (128, 256 // 8)
        assert file.get_tensor("model.layers.0.mlp.down_proj.weight_scale").shape == (128, 2)
    for values in unpacked(folder / "out").model.layers[1].mlp.down_proj.weight.unflatten(1, (2, 128)).flatten(0, 1):
        assert len(values.unique()) <= 16


@pytest.mark.slow
def test_gptq_is_nearer_than_rounding_on_what_it_was_shown(folder):
    """The slow twin rounds each weight to the nearest of its group's sixteen values."""
    quantize(asked(folder))
    before, after = unpacked(folder / "model"), unpacked(folder / "out")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder / "model")(TEXT).input_ids[: 16 * 32]).view(16, 32)
    seen = []
    layer = before.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        before(ids)
        weight, inputs = layer.weight, seen[0]
        groups = weight.unflatten(1, (-1, 128))
        scale = groups.abs().amax(-1, keepdim=True) / 7.5
        nearest = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1)
        wrong = [(inputs @ (weight - each).T).norm() for each in (after.model.layers[0].mlp.up_proj.weight, nearest)]
    assert wrong[0] < 0.7 * wrong[1]


WIDE = {
    opt: dict(hidden_size=64, ffn_dim=128, word_embed_proj_dim=64, vocab_size=280),
    bloom: dict(hidden_size=64, vocab_size=280),
    gpt_neox: dict(hidden_size=64, intermediate_size=128, vocab_size=280),
    qwen2: dict(hidden_size=64, intermediate_size=128, vocab_size=280),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", WIDE, ids=lambda make: make.__name__)
def test_gptq_of_other_families(folder, make):
    shrink(make(**WIDE[make])).save_pretrained(folder / "model")
    quantize(asked(folder, group_size=32, context=32))
    ids = torch.arange(2, 40)[None]
    before, after = logits(folder / "model", ids), logits(folder / "out", ids)
    assert 0 < (after - before).square().mean().sqrt() < 0.5 * before.std()


@pytest.mark.slow
def test_without_a_text_the_last_tokens_of_the_calibration_are_kept_for_measuring(folder, capsys):
    rows = [{"user_input": f"who {i}", "completion": f"the cat {i}"} for i in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows))
    words = ["export", "quantize", "--model", str(folder / "model"), "--output", str(folder / "out"), "--context", "64"]
    words += ["--calibration", str(folder / "rows.json"), "--length", "64", "--samples", "8", "--dtype", "float32"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "perplexity of rows.json, its last tokens" in said.out and "after (gptq)" in said.out
    assert "MB of weights, before" in said.out
    assert not said.err
    assert main(words) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_group_that_does_not_fit_is_found_before_weights_are_read(folder, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    for width, fits in ((96, 32), (80, 16)):
        model = llama(vocab=280, width=width, intermediate_size=256, num_attention_heads=2)
        model.config.save_pretrained(folder / "model")
        with pytest.raises(ConfigError, match=rf"--group-size: 128 .* has {width}\); {fits} divides all of them"):
            quantize(asked(folder))
    gpt2().config.save_pretrained(folder / "model")
    with pytest.raises(ConfigError, match="gpt2 has no linear layers"):
        quantize(asked(folder))
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": None}, "--calibration: gptq looks at data"),
        ({"method": "nf4", "calibration": "text.txt"}, "--calibration: nf4 looks at no data"),
        ({"method": "nf4", "text": None}, "--text: name a text"),
    ],
)
def test_options_that_do_not_go_together(folder, options, message):
    method = options.pop("method", "gptq")
    with pytest.raises(ConfigError, match=message):
        quantize(asked(folder, method, **options))


def test_models_that_are_no_whole_ones(folder):
    quantize(asked(folder, "nf4"))
    again = Asked(folder / "out", folder / "again", "nf4", None, folder / "text.txt")
    with pytest.raises(ConfigError, match="are quantized already"):
        quantize(again)
    (folder / "model" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "x"}))
    with pytest.raises(ConfigError, match="holds adapters; make it whole first: chatrlhf export merge"):
        quantize(Asked(folder / "model", folder / "again", "nf4", None, folder / "text.txt"))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        quantize(Asked(folder, folder / "again", "nf4", None, folder / "text.txt"))


def test_too_little_to_look_at(folder):
    (folder / "short.txt").write_text("the cat")
    with pytest.raises(DataError, match="--calibration: .* tokens are too few for a piece of 32"):
        quantize(asked(folder, calibration=folder / "short.txt"))
    with pytest.raises(DataError, match="too few for a context of 64"):
        quantize(asked(folder, text=folder / "short.txt"))


@pytest.mark.parametrize("option", ["--group-size=0", "--samples=-1", "--context=1", "--windows=none"])
def test_numbers_that_are_none(folder, option, capsys):
    words = [
        "--model",
        str(folder / "model"),
        "--output",
        str(folder / "out"),
        "--calibration",
        str(folder / "text.txt"),
    ]
    with pytest.raises(SystemExit):
        main(["export", "quantize", *words, option])
    assert "is not a whole number from" in capsys.readouterr().err


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs llmcompressor; pip install \"chatrlhf\[quantize\]\""):
        quantize(asked(folder))
