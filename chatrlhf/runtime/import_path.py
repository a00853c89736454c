"""Order of Python's import path: a user's folder comes behind Python's own modules, which its files cannot replace."""

from __future__ import annotations

import os
import sys


def put_behind_stdlib(folder: str) -> None:
    """Make a folder importable, ahead of installed packages and behind Python's own modules.

    Whoever has it on the path already has put it where it is on purpose; see `demote_script_folder` for the rest.
    """
    if folder not in sys.path:
        sys.path.insert(_behind_stdlib(), folder)


def demote_script_folder() -> None:
    """Move what Python puts in front, the folder of a script or of ``python -m``, behind Python's own modules."""
    if getattr(sys.flags, "safe_path", False) or not sys.path:  # then it has put nothing there
        return
    script_folder = os.path.dirname(os.path.abspath(sys.argv[0]))
    if os.path.realpath(sys.path[0] or os.getcwd()) in map(os.path.realpath, (script_folder, os.getcwd())):
        folder = sys.path.pop(0)
        sys.path.insert(_behind_stdlib(), folder)


def hidden_by_stdlib(module: str, folder: str) -> bool:
    """Whether a folder holds a module of this name that Python's own one keeps from being imported."""
    top = module.partition(".")[0]
    files = (os.path.join(folder, f"{top}.py"), os.path.join(folder, top, "__init__.py"))
    return top in sys.stdlib_module_names and any(map(os.path.isfile, files))


def _behind_stdlib() -> int:
    """The place in the path behind the last folder of Python's own modules."""
    own = os.path.dirname(os.__file__)
    folders = {own, os.path.join(own, "lib-dynload"), os.path.join(sys.base_prefix, "DLLs")}
    return 1 + max((i for i, path in enumerate(sys.path) if path in folders), default=-1)
