"""Meta's original LLaMA files, named as actor or reward model: the command that converts them, ready to be copied."""

from __future__ import annotations

import json

import pytest
from small_run import write_config, write_files

from chatrlhf.cli import main
from chatrlhf.models.loading.meta_llama import how_to_convert

SECOND = {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-05, "vocab_size": -1}
FIRST = SECOND | {"norm_eps": 1e-06}
THIRD = SECOND | {"vocab_size": 128256, "n_kv_heads": 8, "rope_theta": 500000.0}


@pytest.fixture
def meta(tmp_path):
    folder = tmp_path / "llama" / "13B"
    folder.mkdir(parents=True)
    for i in range(2):
        (folder / f"consolidated.{i:02d}.pth").write_bytes(b"weights")
    (folder / "params.json").write_text(json.dumps(FIRST))
    (folder.parent / "tokenizer.model").write_bytes(b"")
    return folder


@pytest.mark.parametrize(("flag", "key"), [("-a", "actor_config.model"), ("-r", "reward_config.model")])
@pytest.mark.parametrize("dry", [False, True])
def test_the_command_is_named_before_anything_is_written(meta, tmp_path, capsys, flag, key, dry):
    write_files(tmp_path)
    config = write_config(tmp_path)
    words = [str(config), flag, str(meta), "--output-dir", str(tmp_path / "run"), *(["--dry-run"] if dry else [])]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"{key}: '{meta}' holds Meta's original LLaMA files" in said
    assert (
        f"cp {meta.parent}/tokenizer.model {meta} && python -m transformers.models.llama.convert_llama_weights_to_hf "
        f"--input_dir {meta} --output_dir {meta}-hf --num_shards 2 --llama_version 1, and name {meta}-hf"
    ) in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("params", "version"), [(FIRST, "1"), (SECOND, "2"), (THIRD, "3"), (THIRD | {"use_scaled_rope": True}, "3.1")]
)
def test_the_version_is_read_from_the_dimensions(meta, params, version):
    (meta / "params.json").write_text(json.dumps(params))
    (meta / "tokenizer.model").write_bytes(b"")
    command = how_to_convert(str(meta))
    assert f"--llama_version {version}, and" in command and "cp " not in command


def test_other_folders_are_none(meta, tmp_path):
    assert how_to_convert(str(tmp_path)) is None
    assert how_to_convert("facebook/opt-125m") is None
    (meta / "params.json").unlink()
    assert how_to_convert(str(meta)) is None
