"""Gzip files read with a bound on how much they may hold: a file of a megabyte can unpack to a gigabyte of blanks."""

from __future__ import annotations

import gzip
import io
from typing import IO

from chatrlhf.errors import DataError

# DEFLATE packs at most 1032:1. Text packs 3:1 to 10:1, rows that are nearly equal 50:1.
MOST_RATIO, ALLOWED = 200, 2**26  # times its size in the archive, beyond this many bytes
CHUNK = 2**17


class _Bounded(io.RawIOBase):
    def __init__(self, packed: IO[bytes], name: str) -> None:
        self._packed, self._name = packed, name
        self._file, self._read = gzip.GzipFile(fileobj=packed), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._file.read(min(len(buffer), CHUNK))
        buffer[: len(content)] = content
        self._read += len(content)
        if self._read > ALLOWED and self._read > MOST_RATIO * self._packed.tell():
            raise DataError(
                f"{self._name}: it unpacks to more than {MOST_RATIO} times its size, as text never does; unpack it "
                "yourself if you trust it"
            )
        return len(content)

    def tell(self) -> int:
        return self._read

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """To the start alone, which is all that whoever reads rows asks for."""
        if (offset, whence) != (0, io.SEEK_SET):
            raise io.UnsupportedOperation("only its start can be sought")
        self._read = 0
        return self._file.seek(0)


def bounded_gzip(packed: IO[bytes], name: str) -> IO[bytes]:
    """The unpacked bytes of an open gzip file; reading them raises DataError where they are far too many.

    Args:
        name: of the file, for the message.
    """
    return io.BufferedReader(_Bounded(packed, name), CHUNK)
