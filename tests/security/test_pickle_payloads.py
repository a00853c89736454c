"""No pickle that a model folder, an adapter, a checkpoint or a dataset holds is run."""

from __future__ import annotations

import json
import pickle

import numpy
import pytest
import torch
from hostile import WRITERS, Payload, bare_pickle, line_about, torch_file
from tiny import llama, tokenizer

from chatrlhf import load_reward_model
from chatrlhf.data.files import read_rows
from chatrlhf.models.loading.adapter_loading import read_adapters
from chatrlhf.models.loading.pretrained import load_backbone, load_language_model
from chatrlhf.models.loading.weight_files import damage
from chatrlhf.sharding.safe_loading import known_objects
from chatrlhf.tools.export.weights import Weights

KEY = "actor_config.model"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model's folder without its weights."""
    folder = tmp_path_factory.mktemp("model")
    llama(vocab=270).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(sound, tmp_path):
    """A folder in which a payload is to be put in place of the weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in sound.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("how", WRITERS)
def test_the_payload_acts_where_it_is_let(tmp_path, how):
    """Or the others would prove nothing."""
    WRITERS[how](tmp_path / "file", tmp_path / "proof")
    if how == "pickle":
        pickle.loads((tmp_path / "file").read_bytes())
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "proof").is_dir()


@pytest.mark.parametrize("how", WRITERS)
@pytest.mark.parametrize("load", [load_language_model, load_backbone], ids=["with its head", "without"])
def test_pytorch_model_bin_does_not_run(model, tmp_path, how, load):
    WRITERS[how](model / "pytorch_model.bin", tmp_path / "proof")
    line = line_about(lambda: load(str(model), KEY))
    assert KEY in line and "pytorch_model.bin" in line
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("how", WRITERS)
def test_a_shard_does_not_run(model, tmp_path, how):
    name = "pytorch_model-00001-of-00001.bin"
    WRITERS[how](model / name, tmp_path / "proof")
    (model / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"weight": name}}))
    assert name in line_about(lambda: load_language_model(str(model), KEY))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("how", WRITERS)
def test_weights_that_are_exported_do_not_run(model, tmp_path, how):
    WRITERS[how](model / "pytorch_model.bin", tmp_path / "proof")
    assert "pytorch_model.bin" in line_about(lambda: Weights(model, "--base"))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "head.safetensors"])
def test_a_pickle_by_the_name_of_safetensors_does_not_run(tmp_path, name):
    torch_file(tmp_path / name, tmp_path / "proof")
    assert name in damage(tmp_path / name)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("how", WRITERS)
def test_adapters_do_not_run(tmp_path, how):
    folder = tmp_path / "adapters"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    WRITERS[how](folder / "adapter_model.bin", tmp_path / "proof")
    assert "adapter_model.bin" in line_about(lambda: read_adapters(folder))
    assert not (tmp_path / "proof").exists()


def test_files_that_no_one_needs_do_not_run(sound, model, tmp_path):
    """A folder may hold the leavings of a trainer."""
    (model / "model.safetensors").write_bytes((sound / "model.safetensors").read_bytes())
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "vocab.pkl", "scaler.pt"):
        torch_file(model / name, tmp_path / "proof")
    load_language_model(str(model), KEY)
    assert not (tmp_path / "proof").exists()


def test_a_reward_model_does_not_run(model, tmp_path):
    torch_file(model / "pytorch_model.bin", tmp_path / "proof")
    torch_file(model / "head.bin", tmp_path / "proof")
    line_about(lambda: load_reward_model(model))
    assert not (tmp_path / "proof").exists()


ROWS = {
    "rows.pkl": lambda path, proof: bare_pickle(path, proof),
    "rows.pickle": lambda path, proof: bare_pickle(path, proof),
    "rows.pt": lambda path, proof: torch_file(path, proof),
    "rows.json": lambda path, proof: bare_pickle(path, proof),
    "rows.jsonl": lambda path, proof: bare_pickle(path, proof),
    "rows.csv": lambda path, proof: bare_pickle(path, proof),
    "rows.parquet": lambda path, proof: bare_pickle(path, proof),
    "rows.npy": lambda path, proof: numpy.save(path, numpy.array([Payload(proof)], dtype=object), allow_pickle=True),
    "rows.npz": lambda path, proof: numpy.savez(path, rows=numpy.array([Payload(proof)], dtype=object)),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_dataset_does_not_run(tmp_path, name):
    ROWS[name](tmp_path / name, tmp_path / "proof")
    assert str(tmp_path / name) in line_about(lambda: list(read_rows(tmp_path / name)))
    assert not (tmp_path / "proof").exists()


def test_the_list_of_a_checkpoints_shards_does_not_run(tmp_path):
    (tmp_path / "part-0").mkdir()
    (tmp_path / "part-0" / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "proof")))
    with_list = known_objects(tmp_path)
    assert "posix.mkdir, which would run when it is read" in line_about(with_list.__enter__)
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("how", ["torch.save", "old torch.save"])
def test_states_of_deepspeed_do_not_run(tmp_path, how):
    """It asks for any object; inside, it gets tensors."""
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    WRITERS[how](path, tmp_path / "proof")
    with known_objects(tmp_path), pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(path, weights_only=False)
    assert not (tmp_path / "proof").exists()


def test_a_users_own_files_are_read_as_before(tmp_path):
    """What a reward function loads is its own affair: the limits end with the checkpoint's loading."""
    torch.save({"any": range(3)}, tmp_path / "mine.pt")
    with known_objects(tmp_path):
        pass
    assert torch.load(tmp_path / "mine.pt", weights_only=False) == {"any": range(3)}


def test_the_classes_in_states_of_deepspeed_are_known_inside_alone(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    with known_objects(tmp_path):
        assert LossScaler in torch.serialization.get_safe_globals()
    assert LossScaler not in torch.serialization.get_safe_globals()
