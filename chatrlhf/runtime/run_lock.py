"""A lock on a run's folder, or on a file that a script writes: one process at a time may write there.

The lock is the kernel's (flock), so that it ends with its process however that ends, and nothing is left to be cleared
away after a crash. A file system without such locks (some network mounts) is noticed, and there the file's own words
have to do: a process of this host that is gone holds nothing, one of another host is believed.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from chatrlhf.errors import LockedError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
BUSY = (errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLock:
    """The lock of one folder, or of one file in it. It can be taken again where it is held.

    Args:
        folder: where the lock lies; it has to be there when the lock is taken.
        key: the configuration's key or the option that names the folder or file, for the error.
        file: name of the one file that is locked; "": the whole folder.
    """

    def __init__(self, folder: Path, key: str = "output_dir", file: str = "") -> None:
        self.path = folder / (f".{file}{LOCK}" if file else LOCK)
        self._of = f"{key}: {folder / file}"
        self._other = "file" if file else "folder"
        self._file: int | None = None
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # or a child that outlives us would hold it

    @property
    def is_held(self) -> bool:
        return self._file is not None

    def acquire(self) -> None:
        """Take the lock of a folder that is there.

        Raises:
            LockedError: another process has it; the line says which.
            OSError: the file cannot be written.
        """
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if not _lock(file):
                    self._refuse_if_alive()
                elif not self._is_still(file):
                    continue  # its holder has removed it between our opening and our locking it
                os.ftruncate(file, 0)
                os.write(file, json.dumps(_this_process()).encode())
                self._file, file = file, -1
            except BlockingIOError:
                raise LockedError(self._held_by(_read(self.path))) from None
            finally:
                if file >= 0:
                    os.close(file)

    def release(self) -> None:
        """Give it back; the file goes, too."""
        if self._file is not None:
            with suppress(OSError):  # with its folder, for instance
                self.path.unlink()
            os.close(self._file)
            self._file = None

    def __enter__(self) -> RunLock:
        self.acquire()
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _is_still(self, file: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(file))
        except FileNotFoundError:
            return False

    def _refuse_if_alive(self) -> None:
        """Where there are no locks: by what the file says."""
        holder, own = _read(self.path), _this_process()
        if not holder or holder.get("pid") == own["pid"] and holder.get("boot") == own["boot"]:
            return
        if holder.get("host") == own["host"]:
            if holder.get("boot") != own["boot"] or not _is_alive(holder.get("pid")):
                return
            raise LockedError(self._held_by(holder))
        raise LockedError(f"{self._held_by(holder)}; if that process is gone, remove {self.path}")

    def _held_by(self, holder: dict[str, Any]) -> str:
        who = "another process"
        if holder:
            who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
        return f"{self._of} is in use by {who}; wait until it has ended, or name another {self._other}"


def lock_beside(file: Path, key: str) -> RunLock:
    """The lock of a file that a script writes, whether or not that is there yet; the others in its folder are free."""
    return RunLock(file.parent, key, file.name)


def _lock(file: int) -> bool:
    """Whether the kernel gave it; False where it knows no locks here. BlockingIOError: another process has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        if error.errno in BUSY:
            raise BlockingIOError from None
        raise
    return True


def _this_process() -> dict[str, Any]:
    boot = BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.exists() else ""
    since = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "boot": boot}


def _read(path: Path) -> dict[str, Any]:
    """What its holder wrote; empty where that cannot be read (yet)."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _is_alive(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, TypeError, OverflowError):  # somebody else's process; no number
        return True
    return True
