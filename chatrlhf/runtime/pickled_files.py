"""Pickled objects of PyTorch's files: which classes and functions they name, found out without calling any.

PyTorch reads most files with ``weights_only=True``. DeepSpeed and its distributed checkpoints do not, so whoever reads
theirs asks here first.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any


class _Stub:
    """Stands for whatever a pickle names; takes any arguments, state and items."""

    def __new__(cls, *_: Any, **__: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Stub:
        return _Stub()

    def append(self, item: Any) -> None:
        """As a list."""

    def extend(self, items: Any) -> None:
        """As a list."""

    add = append


class _Reader(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self.names: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return type("Stub", (_Stub,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _Stub()


def names_in(path: Path) -> set[str]:
    """The classes and functions that a pickled file names, dotted.

    Args:
        path: one of PyTorch's (a zip archive with a pickle in it), or a bare pickle.

    Raises:
        ValueError: it is neither, or too strange to be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                return _names(file)
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".pkl")]
            names: set[str] = set()
            for name in inside:
                with archive.open(name) as file:
                    names |= _names(file)
            return names
    except Exception as error:  # a pickle is a program: with stubs in place of what it calls, anything may fail
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _names(file: IO[bytes]) -> set[str]:
    reader = _Reader(file)
    reader.load()
    return reader.names
