"""Small files that unpack to gigabytes, and headers that promise them, are refused before they take memory."""

from __future__ import annotations

import gzip
import json
import os
import resource
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import line_about
from safetensors.torch import save_file
from tiny import llama, tokenizer

from chatrlhf.data import gzip_reader
from chatrlhf.data.files import open_rows, read_rows
from chatrlhf.models.loading.adapter_loading import read_adapters
from chatrlhf.models.loading.pretrained import load_language_model, read_model_config
from chatrlhf.models.loading.tokenizer import load_tokenizer
from chatrlhf.models.loading.weight_files import damage
from chatrlhf.tools.export.weights import Weights

KEY = "actor_config.model"
BLANKS = 2**23
UNPACKED = {
    "rows.jsonl.gz": b'{"user_input": "' + b"a" * BLANKS,
    "rows.json.gz": b"[" + b" " * BLANKS,
    "rows.csv.gz": b'a,b\n"' + b"a" * BLANKS,
    "rows.txt.gz": b"a" * BLANKS,
    "blank lines.jsonl.gz": b"\n" * BLANKS,
}


@pytest.fixture(autouse=True)
def memory(monkeypatch):
    """What a test may take beyond what there is: a gigabyte. Bombs are smaller here, and so is what is allowed."""
    monkeypatch.setattr(gzip_reader, "ALLOWED", 2**20)
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    llama(vocab=270).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("read", [lambda path: list(read_rows(path)), open_rows], ids=["in turn", "in any order"])
@pytest.mark.parametrize("name", UNPACKED)
def test_gzip(tmp_path, name, read):
    (tmp_path / name).write_bytes(gzip.compress(UNPACKED[name]))
    line = line_about(lambda: read(tmp_path / name))
    assert line.startswith(str(tmp_path / name)) and "200 times its size" in line


def test_rows_that_are_much_alike_are_no_bomb(tmp_path):
    row = json.dumps({"user_input": "hello there", "completion": "well " * 50})
    text = "".join(f'{row[:-2]}{i}"}}\n' for i in range(10_000))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    assert len(list(read_rows(tmp_path / "rows.jsonl.gz"))) == 10_000


def zip_bomb(path) -> None:
    """A PyTorch file whose pickle is packed: 8 MB in 8 KB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"0" * BLANKS)
        archive.writestr("archive/version", "3")


def overlapping(path) -> None:
    """A PyTorch file whose table names one record a hundred times."""
    torch.save({"weight": torch.zeros(9999)}, path)
    content = path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    count, size, start = struct.unpack("<HII", content[end + 10 : end + 20])
    table = content[start : start + size]
    ends = content[end:]
    ends = ends[:8] + struct.pack("<HHII", count * 99, count * 99, size * 99, start) + ends[20:]
    path.write_bytes(content[:start] + table * 99 + ends)


@pytest.mark.parametrize("write", [zip_bomb, overlapping])
def test_archives_of_weights(model, write):
    (model / "model.safetensors").unlink()
    write(model / "pytorch_model.bin")
    assert "pytorch_model.bin" in line_about(lambda: load_language_model(str(model), KEY))
    assert "pytorch_model.bin" in line_about(lambda: Weights(model, "--base"))
    assert "unpacks to" in damage(model / "pytorch_model.bin")


def test_archives_of_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    zip_bomb(tmp_path / "adapter_model.bin")
    assert "unpacks to" in line_about(lambda: read_adapters(tmp_path))


def test_pytorchs_own_files_are_no_bombs(tmp_path):
    torch.save({"weight": torch.zeros(9), "bias": torch.zeros(1000)}, tmp_path / "pytorch_model.bin")
    assert damage(tmp_path / "pytorch_model.bin") is None


def header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


TENSOR = json.dumps({"a": {"dtype": "F32", "shape": [2**30, 2**20], "data_offsets": [0, 8]}}).encode()
HEADERS = {
    "a terabyte": header(2**40),
    "beyond all": header(2**64 - 1),
    "just too long": header(100_000_001, b"{}" + b" " * 1000),
    "a tensor larger than the file": header(len(TENSOR), TENSOR + b"0" * 8),
    "deep": header(200_000, b'{"a":' + b"[" * 199_995),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(model, name):
    (model / "model.safetensors").write_bytes(HEADERS[name])
    assert "model.safetensors" in line_about(lambda: load_language_model(str(model), KEY))


def test_a_header_of_half_a_gigabyte_that_is_there(model):
    """A sparse file: it takes no room on the disk."""
    path = model / "model.safetensors"
    path.write_bytes(header(2**29))
    os.truncate(path, 2**29 + 8)
    assert "model.safetensors" in line_about(lambda: load_language_model(str(model), KEY))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_texts_of_gigabytes(model, name):
    (model / name).touch()
    os.truncate(model / name, 2**33)
    for load in (read_model_config, load_tokenizer):
        line = line_about(lambda load=load: load(str(model), KEY))
        assert str(model) in line and name in line and "has 8,589,934,592 bytes" in line


def test_weights_of_this_package_are_no_bomb(tmp_path):
    save_file({"weight": torch.zeros(9)}, tmp_path / "model.safetensors")
    assert damage(tmp_path / "model.safetensors") is None
