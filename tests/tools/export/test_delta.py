"""Differences of weights: put together again they are the target, bit for bit, and only on their own base."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama
from transformers import AutoModelForCausalLM

from chatrlhf.cli import main
from chatrlhf.errors import CheckpointError, ConfigError
from chatrlhf.runtime.atomic_files import CONTENTS
from chatrlhf.tools.export.delta import ABOUT, apply_delta, difference, make_delta, total
from chatrlhf.tools.export.weights import Weights


@pytest.fixture
def models(tmp_path):
    """A base and a target that was trained from it, as folders; with a dtype, and rows more in the vocabulary."""

    def make(dtype=torch.float32, more_rows=0, max_shard_size="5GB"):
        base = llama(seed=0, vocab=300).to(dtype)
        target = llama(seed=0, vocab=300).to(dtype)
        target.resize_token_embeddings(300 + more_rows)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            for weight in target.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight += (0.01 * noise).to(dtype)
                weight.view(-1)[:3] = torch.tensor([0.0, 1e-4, 100.0], dtype=dtype)  # far from the base's
        for name, model in (("base", base), ("target", target)):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        (tmp_path / "target" / "chat_template.jinja").write_text("{{ messages }}")
        return tmp_path / "base", tmp_path / "target"

    return make


def no_warning(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("more_rows", "size"), [(0, "5GB"), (7, "5GB"), (-9, "5GB"), (7, "20KB")])
def test_base_and_delta_are_the_target_bit_for_bit(models, tmp_path, dtype, more_rows, size):
    base, target = models(dtype, more_rows, size)
    make_delta(base, target, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "again", no_warning)
    assert Weights(tmp_path / "again", "k").sha256() == Weights(target, "k").sha256()
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    models_ = [AutoModelForCausalLM.from_pretrained(path) for path in (target, tmp_path / "again")]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        first, second = (model.eval()(ids).logits for model in models_)
    torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True)
    shards = len(list(target.glob("*.safetensors")))
    assert (shards > 1) == (size == "20KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) == shards


def test_a_delta_is_the_difference_and_holds_no_weights_of_the_base(models, tmp_path):
    base, target = models()
    make_delta(base, target, tmp_path / "delta")
    found = load_file(tmp_path / "delta" / "model.safetensors")
    theirs, ours = load_file(base / "model.safetensors"), load_file(target / "model.safetensors")
    assert found.keys() == ours.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, ours[name] - theirs[name])
        assert not torch.equal(value, ours[name])


def test_another_base_is_refused(models, tmp_path):
    base, target = models()
    make_delta(base, target, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="is not the base that this delta was made from, 'base'"):
        apply_delta(target, tmp_path / "delta", tmp_path / "again", no_warning)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="is not the base"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again", no_warning)
    assert not (tmp_path / "again").exists()


def test_the_hash_of_a_base_does_not_depend_on_its_files(models, tmp_path):
    whole = Weights(models()[0], "k").sha256()
    assert Weights(models(max_shard_size="20KB")[0], "k").sha256() == whole
    assert Weights(models(torch.bfloat16)[0], "k").sha256() != whole


def test_a_damaged_delta_is_found(models, tmp_path):
    base, target = models()
    make_delta(base, target, tmp_path / "delta")
    path = tmp_path / "delta" / "model.safetensors"
    (tmp_path / "delta" / CONTENTS).unlink()  # the delta's own record names the tensor
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="damaged: model.norm.weight"):
        apply_delta(base, tmp_path / "delta", tmp_path / "again", no_warning)
    assert not (tmp_path / "again").exists()


def test_a_delta_of_others_is_added_with_a_warning(models, tmp_path):
    base, target = models()
    make_delta(base, target, tmp_path / "delta")
    for name in (ABOUT, CONTENTS):
        (tmp_path / "delta" / name).unlink()
    said = []
    apply_delta(base, tmp_path / "delta", tmp_path / "again", said.append)
    assert len(said) == 1 and "does not say which base" in said[0]
    assert Weights(tmp_path / "again", "k").sha256() == Weights(target, "k").sha256()


def test_weights_in_pytorchs_files_will_do(models, tmp_path):
    base, target = models()
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    make_delta(base, target, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "again", no_warning)
    assert Weights(tmp_path / "again", "k").sha256() == Weights(target, "k").sha256()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_places_where_the_sum_rounds_away_are_known(dtype):
    base = torch.tensor([1.0, 1000.0, 3.0, -2.0], dtype=dtype)
    value = torch.tensor([1.001, 1e-3, 3.0, -0.0], dtype=dtype)
    made, wrong = difference(value, base)
    again = total(made, base)
    differ = again != value
    differ |= torch.signbit(again) != torch.signbit(value)
    assert wrong.tolist() == differ.nonzero().flatten().tolist()
    assert 3 in wrong and 0 not in wrong  # -0.0 comes out as 0.0
    assert difference(value, None)[0] is not value and torch.equal(difference(value, None)[0], value)


def test_the_commands(models, tmp_path, capsys):
    base, target = models()
    delta, again = tmp_path / "delta", tmp_path / "again"
    assert main(["export", "delta", "--base", str(base), "--target", str(target), "--output", str(delta)]) == 0
    assert main(["export", "apply-delta", "--base", str(base), "--delta", str(delta), "--output", str(again)]) == 0
    assert Weights(again, "k").sha256() == Weights(target, "k").sha256()
    assert json.loads((delta / ABOUT).read_text())["base_sha256"] == Weights(base, "k").sha256()
    assert main(["export", "delta", "--base", str(base), "--target", str(target), "--output", str(delta)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert (
        main(["export", "apply-delta", "--base", str(target), "--delta", str(delta), "--output", str(base) + "2"]) == 2
    )
    assert "is not the base" in capsys.readouterr().err


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ConfigError, match="--base: .*nowhere has no weights"):
        make_delta(tmp_path / "nowhere", tmp_path, tmp_path / "out")
