"""Every answer, written down as soon as it is there: what is in a journal is neither asked nor paid for again.

A JSON line an answer. Lines are only ever added, each by one write, so that a process that is killed leaves at most its
last line incomplete; that is taken away when the journal is opened again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chatrlhf.config.strict_json import parse_row
from chatrlhf.errors import DataError
from chatrlhf.runtime.atomic_files import PRIVATE
from chatrlhf.tools.synth.llm import Reply

KEY = "key"


class Journal:
    """A journal open for one process."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where another process has it open, or it is none."""
        import filelock

        self.path = path
        self.replies: dict[str, Reply] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
            self._lock.acquire()
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, PRIVATE)
        except filelock.Timeout:
            raise DataError(f"{path}: another process writes to it; wait for that, or give another --output") from None
        except OSError as error:
            raise DataError(f"{path}: it cannot be written ({error.strerror}); give another --output") from None
        try:
            os.ftruncate(self._file, self._read())
        except BaseException:
            self.close()
            raise

    def add(self, key: str, reply: Reply) -> None:
        """Write an answer down."""
        line = json.dumps({KEY: key, **_given(asdict(reply))}, ensure_ascii=True)
        os.write(self._file, f"{line}\n".encode())
        self.replies[key] = reply

    def close(self) -> None:
        """Let others have it."""
        if hasattr(self, "_file"):
            os.close(self._file)
        self._lock.release()

    def _read(self) -> int:
        """Read what is there; returns where its last whole line ends."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                try:
                    values = parse_row(line.decode())
                    key = values.pop(KEY)
                    self.replies[key] = Reply(**values)
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise DataError(
                        f"{self.path}, line {number}: this is no journal of answers; remove the file, or give another "
                        "--output"
                    ) from None
        return end

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
