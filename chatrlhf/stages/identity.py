"""Identity of what a run is made from: SHA-256 of weights, tokenizers, files and source code, commits of the hub.

Weights are hashed whole. Size and modification time are no identity, and samples of blocks would miss the few rows that
added tokens change. It costs little: files are read once, four at a time, at a gigabyte or two a second each, and the
model that is loaded next finds them in memory.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from chatrlhf.models.loading.lora import base_of, revision_of_base
from chatrlhf.runtime.file_hash import sha256_of

WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "config.json", "adapter_config.json", "reward_model.json")
TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json", "*.model", "chat_template*",
)  # fmt: skip
WORTH_A_LINE = 5 * 10**9  # bytes of weights
AT_ONCE = 4  # files


def of_model(name: str, revision: str | None, note: Callable[[str], None]) -> str | None:
    """Identity of a model's weights and configuration, and of the base that adapters in a folder belong to.

    Args:
        name: a folder, or a model of the hub.
        note: is told where there is much to read.

    Returns:
        A hash, or the hub's commit; None where neither can be had.
    """
    if not Path(name).is_dir():
        return _commit(name, revision, "config.json")
    files = _files(name, WEIGHTS)
    size = sum(file.stat().st_size for file in files)
    if size > WORTH_A_LINE:
        note(f"{name}: hashing {size / 1e9:.0f} GB of weights, so that --resume can tell whether they are the same")
    own, base = _of_files(files), base_of(name)
    if base is None:
        return own
    return of_text(f"{own} {of_model(base, revision_of_base(name).get('revision'), note)}")


def of_tokenizer(name: str, revision: str | None = None) -> str | None:
    """Identity of a tokenizer, its chat template included; as `of_model`."""
    if not Path(name).is_dir():
        return _commit(name, revision, "tokenizer_config.json")
    return _of_files(_files(name, TOKENIZER))


def of_function(function: Callable[..., Any], module: str | None = None) -> str | None:
    """Identity of a function's source without comments and layout: of the whole module by name, else of it alone.

    Returns:
        None where there is no source, as of what was typed into a terminal.
    """
    try:
        source = inspect.getsource(sys.modules[module] if module else _with_source(function))
    except (OSError, TypeError):
        return None
    try:
        return of_text(ast.dump(ast.parse(textwrap.dedent(source))))
    except SyntaxError:  # a lambda in the midst of an expression
        return of_text(source)


def of_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def of_values(values: Any) -> str:
    """SHA-256 of what JSON can hold, whatever its layout."""
    return of_text(json.dumps(values, sort_keys=True))


def _with_source(function: Callable[..., Any]) -> Any:
    plain = inspect.unwrap(function)
    return plain if inspect.isroutine(plain) else type(plain)


def _files(folder: str, patterns: Iterable[str]) -> list[Path]:
    return sorted({file for pattern in patterns for file in Path(folder).glob(pattern) if file.is_file()})


def _of_files(files: list[Path]) -> str:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        hashes = list(threads.map(_of_file, files))
    return of_values({file.name: digest for file, digest in zip(files, hashes, strict=True)})


def _of_file(file: Path) -> str:
    state = file.stat()
    return _hashed(file.resolve(), state.st_size, state.st_mtime_ns, state.st_ino)


@lru_cache(maxsize=1024)
def _hashed(file: Path, size: int, modified: int, inode: int) -> str:
    """Several stages of one process start from one file, which is then read once."""
    return sha256_of(file)


def _commit(name: str, revision: str | None, file: str) -> str | None:
    """The commit of a model on the hub, as it is in the hub's cache."""
    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        return extract_commit_hash(cached_file(name, file, revision=revision), None)
    except OSError:
        return None
