"""Boundary to the outside world: what it does wrong becomes one line for people, its traceback a log file.

`doing` goes around what a disk, a file, memory or another library can break, and says what was being done. A fault of
this package is left alone: it keeps its traceback.
"""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
import re
import sys
import sysconfig
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from chatrlhf.errors import Interrupted, OutsideError, UserError
from chatrlhf.errors.disks import disk_of
from chatrlhf.errors.redaction import redacted

OUR_FAULT, USER_ERROR, STOPPED = 1, 2, 130  # exit statuses
ASK_FOR_REPORT = (
    "this is a fault in chatrlhf, not in your files; please report it with the lines above, the command and the "
    "configuration"
)
MOST_OF_PATH = 240  # characters in a message
PACKAGE = str(Path(__file__).parents[1]) + os.sep
LIBRARIES = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib"))

# Errors that are never this package's fault. Those of other packages stand by name, because `--help` imports none of
# them; a class stands for those derived from it, too.
TYPES = (
    OSError,
    MemoryError,
    EOFError,
    UnicodeError,
    json.JSONDecodeError,
    csv.Error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
)
NAMES = {
    "httpx.HTTPError",
    "huggingface_hub.StrictDataclassError",
    "jinja2.TemplateError",
    "openai.OpenAIError",
    "pyarrow.ArrowException",
    "pyo3_runtime.PanicException",
    "safetensors.SafetensorError",
    "torch.DistError",
    "yaml.YAMLError",
}
PARSERS = ("json", "yaml")  # a RecursionError of theirs is text that is nested too deeply
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust's libraries name errno

MORE_ROOM = "make room there; training then continues with --resume"
REMEDIES = {
    errno.ENOSPC: MORE_ROOM,
    errno.EDQUOT: MORE_ROOM,
    errno.EIO: "the disk, or the way to it, fails: see the system's log, and name another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f); training then continues with --resume",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENAMETOOLONG: "shorten the path",
    errno.ENOTDIR: "a part of the path is a file; name a folder",
    errno.EISDIR: "name a file",
    errno.EEXIST: "remove it, or name another place",
}


class Reason(NamedTuple):
    """Why something failed, and what can be done about it ("" where nothing is known)."""

    text: str
    remedy: str = ""


OUT_OF_MEMORY = Reason(
    "out of memory",
    "lower micro_batch_size or max_sequence_length, or set peft_enable to True; --dry-run estimates what is needed",
)
# PyTorch and pathlib raise bare RuntimeErrors and ValueErrors for these.
MESSAGES = {
    r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED|size calculation overflowed": OUT_OF_MEMORY,
    r"PytorchStreamWriter|unexpected pos \d+ vs": Reason("a file of PyTorch's cannot be written", MORE_ROOM),
    r"PytorchStreamReader|inline_container": Reason("a file of PyTorch's cannot be read"),
    r"Connection (closed|reset|refused)|gloo|NCCL": Reason(
        "another process of this launch is gone", "see why that one has ended"
    ),
    r"NVIDIA driver|CUDA driver|no kernel image": Reason("the GPU cannot be used", "update its driver, or PyTorch"),
    r"embedded null|home directory|Symlink loop": Reason("it is no path of this machine", "correct it"),
}


@contextmanager
def doing(what: str, path: object = None, untrusted: bool = False) -> Iterator[None]:
    """Say what is being done, in case the outside world makes it fail.

    Args:
        what: a key, stage or action, such as ``"reading the tokenizer in"``.
        path: file or folder, where one is concerned.
        untrusted: what is read comes from outside and a library reads it, so that each of that library's errors, and
            each error of the block's own lines, is a fault of the input. Where it is a user's code, its line is named.

    Raises:
        OutsideError: in place of such a failure, which is its cause. A `UserError` is left as it is.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        calls = list(traceback.walk_tb(error.__traceback__))[1:]  # the first is this one
        reason = _reason(error, calls, untrusted)
        if reason is None:
            raise
        subject = what if path is None else f"{what} {_shortened(path)!r}"
        disk = f" ({facts})" if _is_of_disk(error) and path is not None and (facts := disk_of(path)) else ""
        line = f"{subject}: {reason.text}{_users_line(calls)}" + (f"; {reason.remedy}" if reason.remedy else "") + disk
        raise OutsideError(line, "".join(traceback.format_exception(error))) from error


Calls = list[tuple[FrameType, int]]  # frame and line, from the outermost on


def _reason(error: BaseException, calls: Calls, untrusted: bool) -> Reason | None:
    """Why the outside world made something fail; None for a fault of this package, or a wish to end."""
    if isinstance(error, BrokenPipeError):
        return None  # whoever read the output has gone
    if isinstance(error, MemoryError):
        return Reason(f"{OUT_OF_MEMORY.text} ({_first_line(error)})", OUT_OF_MEMORY.remedy)
    if isinstance(error, OSError) and error.strerror:
        file = "" if error.filename is None else f": {_shortened(error.filename)}"
        return Reason(f"{error.strerror}{file}", REMEDIES.get(error.errno or 0, ""))
    if (number := OS_ERROR.search(str(error))) is not None:
        return Reason(os.strerror(int(number[1])), REMEDIES.get(int(number[1]), ""))
    if isinstance(error, ImportError) and not (error.name or "").startswith("chatrlhf"):
        return Reason(_first_line(error), "install what is missing, in the versions of constraints.txt")
    if isinstance(error, (RuntimeError, ValueError)):
        for pattern, known in MESSAGES.items():
            if re.search(pattern, str(error)):
                return Reason(f"{known.text} ({_first_line(error)})", known.remedy)
    is_input = untrusted and _is_of_input(calls) and isinstance(error, (Exception, SystemExit))
    is_too_deep = isinstance(error, RecursionError) and _package(calls[-1]) in PARSERS
    is_outside = isinstance(error, TYPES) or bool(_names(error) & NAMES)
    return Reason(_first_line(error)) if is_input or is_too_deep or is_outside else None


def _is_of_disk(error: BaseException) -> bool:
    """Whether a disk may be full, as far as an error of Python's, Rust's or PyTorch's says so."""
    known = OS_ERROR.search(str(error))
    number = int(known[1]) if known else getattr(error, "errno", None)
    is_torch = isinstance(error, RuntimeError) and re.search(r"PytorchStreamWriter|unexpected pos \d+ vs", str(error))
    return number in (errno.ENOSPC, errno.EDQUOT) or bool(is_torch)


def _is_of_input(calls: Calls) -> bool:
    """Whether a library raised an error, or the lines of the block itself, and no function of this package."""
    functions = [call for call in calls[1:] if not call[0].f_code.co_name.startswith("<")]  # <listcomp>, <lambda>
    return not functions or not _file(calls[-1]).startswith(PACKAGE)


def _users_line(calls: Calls) -> str:
    """The last line of a user's own code that was called from the block."""
    users = [call for call in calls[1:] if not _file(call).startswith((PACKAGE, "<", *LIBRARIES))]
    return f" ({_file(users[-1])}, line {users[-1][1]})" if users else ""


def _file(call: tuple[FrameType, int]) -> str:
    return call[0].f_code.co_filename


def _package(call: tuple[FrameType, int]) -> str:
    return str(call[0].f_globals.get("__name__")).partition(".")[0]


def _names(error: BaseException) -> set[str]:
    """Package and class of an error and of what it is derived from, such as "yaml.YAMLError"."""
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _shortened(path: object) -> str:
    text = str(path)
    half = MOST_OF_PATH // 2
    return text if len(text) <= MOST_OF_PATH else f"{text[:half]}...{text[-half:]}"


def line_of(error: UserError) -> str:
    """An error in one line; where something outside has failed, with the log file that now holds the traceback."""
    line = re.sub(r"\s*\n\s*", " ", str(error).strip())
    if not isinstance(error, OutsideError):
        return line
    details = "\n".join([error.details, *traceback.format_exception(error, chain=False)])
    log = _written((lambda: error.run_dir, lambda: Path(tempfile.gettempdir())), details)
    return f"{line} (traceback: {log})" if log else f"{line} (no place can be written to for its traceback)"


def _written(folders: Iterable[Callable[[], Path | None]], details: str) -> Path | None:
    """A new log file in the first of the folders that is there and can be written to."""
    for folder_of in folders:
        with suppress(OSError):  # there may be no temporary folder, either
            if (folder := folder_of()) is not None and folder.is_dir():
                return _new_log(folder, details)
    return None


def _new_log(folder: Path, details: str) -> Path:
    handle, name = tempfile.mkstemp(".log", "error-", folder)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(redacted(details))
    except OSError:
        os.unlink(name)
        raise
    return Path(name)


def exit_status(work: Callable[[], int], stopped: str) -> int:
    """The status that a script exits with; what stopped it is said.

    Args:
        stopped: what to say after Ctrl-C, or another signal.
    """
    try:
        with doing(Path(sys.argv[0]).name):
            return work()
    except UserError as error:
        print(f"error: {line_of(error)}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Interrupted as error:
        print(f"{error}; {stopped}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr, flush=True)
        return STOPPED
    except Exception:
        show_fault()
        return OUR_FAULT


def show_fault() -> None:
    """Print the traceback of a fault of this package, and ask for a report."""
    print(redacted(traceback.format_exc()), end="", file=sys.stderr)
    print(f"error: {ASK_FOR_REPORT}", file=sys.stderr, flush=True)
