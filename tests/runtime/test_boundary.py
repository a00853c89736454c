"""What is a fault of the outside world, what is one of ours, and where its traceback goes."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zlib
from pathlib import Path

import jinja2
import pyarrow
import pytest
import torch
import yaml
from safetensors import SafetensorError
from tokenizers import Tokenizer

from chatrlhf.errors import ConfigError, OutsideError, boundary
from chatrlhf.errors.boundary import doing, exit_status, line_of

OUTSIDE = [
    (FileExistsError(errno.EEXIST, "File exists", "/x"), "File exists: /x; remove it"),
    (
        NotADirectoryError(errno.ENOTDIR, "Not a directory", "/x/y"),
        "Not a directory: /x/y; a part of the path is a file",
    ),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "Permission denied: /x; change its permissions"),
    (OSError(errno.EROFS, "Read-only file system", "/x"), "Read-only file system: /x"),
    (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; make room there"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 999), "xxx; shorten the path"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    (SafetensorError("header too large"), "SafetensorError: header too large"),
    (RuntimeError("unexpected pos 64 vs 0"), "continues with --resume (the disk at "),
    (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "a file of PyTorch's cannot"),
    (RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"), "a file of PyTorch's cannot"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out of memory"),
    (MemoryError(), "out of memory (MemoryError); lower micro_batch_size"),
    (RuntimeError("Connection closed by peer [127.0.0.1]:1234"), "another process of this launch is gone"),
    (torch.distributed.DistStoreError("timed out"), "DistStoreError: timed out"),
    (json.JSONDecodeError("Expecting value", "", 0), "JSONDecodeError: Expecting value"),
    (yaml.scanner.ScannerError(problem="found a tab"), "ScannerError: found a tab"),
    (zlib.error("invalid distance"), "error: invalid distance"),
    (EOFError(), "EOFError"),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "invalid start byte"),
    (pickle.UnpicklingError("invalid load key"), "UnpicklingError: invalid load key"),
    (pyarrow.ArrowInvalid("not a Parquet file"), "ArrowInvalid: not a Parquet file"),
    (jinja2.TemplateSyntaxError("unexpected tag", 1), "TemplateSyntaxError: unexpected tag"),
    (ModuleNotFoundError("No module named 'vllm'", name="vllm"), "install what is missing"),
    (ValueError("embedded null byte"), "it is no path of this machine"),
]
OURS = [
    AssertionError("no"),
    AttributeError("'NoneType' object has no attribute 'x'"),
    TypeError("x"),
    IndexError("x"),
    KeyError("x"),
    ValueError("x"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RecursionError("maximum recursion depth exceeded"),
    ModuleNotFoundError("No module named 'chatrlhf.nothing'", name="chatrlhf.nothing"),
    BrokenPipeError(errno.EPIPE, "Broken pipe"),
    KeyboardInterrupt(),
    SystemExit(3),
]


@pytest.mark.parametrize("error, said", OUTSIDE, ids=lambda value: str(value)[:40])
def test_what_the_outside_world_did_is_one_line(error, said):
    with pytest.raises(OutsideError) as caught, doing("ACTOR: reading", "/data/a"):
        raise error
    assert caught.value.__cause__ is error
    line = str(caught.value)
    assert line.startswith("ACTOR: reading '/data/a': ") and said in line and len(line) < 600


@pytest.mark.parametrize("error", OURS, ids=repr)
def test_our_own_faults_and_wishes_to_end_pass(error):
    with pytest.raises(type(error)) as caught, doing("ACTOR"):
        raise error
    assert caught.value is error


def test_the_innermost_place_speaks():
    with pytest.raises(OutsideError, match="^writing '/x': Disk quota") as caught, doing("RL"), doing("writing", "/x"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert "Traceback" in caught.value.details
    with pytest.raises(ConfigError, match="^as it is$"), doing("RL"):
        raise ConfigError("as it is")


def of_ours(text: str):
    """A function as if it stood in this package."""
    names: dict = {"json": json}
    exec(compile(text, boundary.PACKAGE + "planted.py", "exec"), names)
    return names["planted"]


def test_whatever_a_library_raises_about_untrusted_input_is_the_inputs_fault(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(OutsideError, match="Exception: "), doing("reading", "x", untrusted=True):
        Tokenizer.from_file(str(tmp_path / "tokenizer.json"))  # a bare Exception
    with pytest.raises(OutsideError, match="TypeError"), doing("reading", "x", untrusted=True):
        [row["text"] for row in json.loads("[1]")]  # the block's own line
    with pytest.raises(AttributeError), doing("reading", "x", untrusted=True):
        of_ours(
            "def planted():\n    return json.loads('[]').get('x')"
        )()  # a function of ours, which should have looked


def test_a_users_own_line_is_named(tmp_path):
    module = tmp_path / "mine.py"
    module.write_text("def score(texts):\n    return 1 / 0\n")
    names: dict = {}
    exec(compile(module.read_text(), str(module), "exec"), names)
    with pytest.raises(OutsideError) as caught, doing("calling mine:score", untrusted=True):
        names["score"]([])
    assert str(caught.value) == f"calling mine:score: ZeroDivisionError: division by zero ({module}, line 2)"


def failed(run_dir: Path | None) -> OutsideError:
    with pytest.raises(OutsideError) as caught, doing("x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    caught.value.run_dir = run_dir
    return pickle.loads(pickle.dumps(caught.value))  # as ranks send it to each other, without its cause


def test_the_traceback_is_in_the_runs_folder_or_in_the_temporary_one(tmp_path, monkeypatch):
    run_dir, other = tmp_path / "run", tmp_path / "tmp"
    run_dir.mkdir(), other.mkdir()
    monkeypatch.setattr(boundary.tempfile, "gettempdir", lambda: str(other))
    for folder, wanted in ((run_dir, run_dir), (tmp_path / "not made", other), (None, other)):
        line = line_of(failed(folder))
        (log,) = wanted.iterdir()
        assert line.endswith(f"(traceback: {log})") and line.count("\n") == 0
        assert "OSError: [Errno 28] No space left on device" in log.read_text()
        log.unlink()


def test_a_full_disk_leaves_no_half_log(tmp_path, monkeypatch):
    monkeypatch.setattr(boundary.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(boundary.os, "fdopen", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert line_of(failed(tmp_path)).endswith("(no place can be written to for its traceback)")
    assert os.listdir(tmp_path) == []


def test_scripts_exit_with_2_for_the_world_and_1_for_us(capsys):
    def planted(error):
        raise error

    assert exit_status(lambda: 0, "") == 0
    assert exit_status(lambda: planted(ConfigError("two\n  lines")), "") == 2
    assert capsys.readouterr().err == "error: two lines\n"
    assert exit_status(lambda: planted(PermissionError(13, "Permission denied", "/x")), "") == 2
    assert "Permission denied: /x" in capsys.readouterr().err
    assert exit_status(lambda: planted(KeyboardInterrupt()), "stopped") == 130
    assert capsys.readouterr().err == "stopped\n"
    assert exit_status(lambda: planted(TypeError("x")), "") == 1
    assert boundary.ASK_FOR_REPORT in capsys.readouterr().err
