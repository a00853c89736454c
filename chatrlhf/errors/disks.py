"""Which disk a path lies on, and what it has left, for messages about a disk that is full."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress


def disk_of(path: object) -> str:
    """Mount point and free room of the disk that a path is on, or would be; "" where that cannot be asked."""
    with suppress(OSError, ValueError, AttributeError):  # Windows has no statvfs
        place = os.path.abspath(str(path))
        while not os.path.isdir(place):
            place = os.path.dirname(place)
        free, system = shutil.disk_usage(place).free, os.statvfs(place)
        while not os.path.ismount(place):
            place = os.path.dirname(place)
        files = f" and takes {system.f_favail:,} more files" if system.f_files else ""
        return f"the disk at {place} has {free:,} bytes free{files}"
    return ""
