"""Functions that a user's configuration names: found by name, checked before the run, called with errors explained."""

from __future__ import annotations

import importlib
import inspect
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError, RewardError, UserError
from chatrlhf.runtime.import_path import hidden_by_stdlib, put_behind_stdlib

CALL = "(prompts, completions)"
PACKAGE = Path(__file__).parents[1]
# Modules that configurations of earlier releases name; a function keeps working where its module has moved.
MOVED = {"chatrlhf.samples.desk": "chatrlhf.samples.visitor_desk"}


def load_function(name: str, key: str) -> Callable[..., Any]:
    """A function by ``package.module:function``; the working directory is importable.

    Raises:
        ConfigError: the name is malformed, the module does not import, it has no such function, or that takes other
            arguments than prompts and completions.
    """
    module_name, separator, function_name = name.partition(":")
    if not separator or not module_name or not function_name:
        raise ConfigError(f"{key}: expected 'package.module:function', got {name!r}")
    if hidden_by_stdlib(module_name, os.getcwd()):
        raise ConfigError(
            f"{key}: {module_name!r} is the name of a module of Python's own, not of yours; rename your file"
        )
    put_behind_stdlib(os.getcwd())
    try:
        module = importlib.import_module(MOVED.get(module_name, module_name))
    except ImportError as error:
        raise ConfigError(f"{key}: module {module_name!r} cannot be imported ({error})") from error
    except (Exception, SystemExit) as error:  # whatever the user's code does while it is imported
        raise ConfigError(f"{key}: module {module_name!r} cannot be imported ({_described(error)})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"{key}: module {module_name!r} has no function {function_name!r}")
    check_signature(function, f"{key}: {name}")
    return function


def check_signature(function: Callable[..., Any], name: str) -> None:
    """Refuse a function that cannot be called with prompts and completions, or has other names for the two.

    Raises:
        ConfigError: it says what the function takes and what it is given.
    """
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{name} is a coroutine function, which is not supported; define it by 'def'")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return
    try:
        arguments = signature.bind([], []).arguments
        names = [*arguments][:2]
        fits = names[:1] != ["completions"] and names[1:] != ["prompts"]  # trlX: samples, prompts, outputs
    except TypeError:
        fits = False
    if not fits:
        raise ConfigError(
            f"{name} takes {signature}, but is called with two lists of texts, {CALL}; define it as {CALL}, further "
            "parameters with defaults"
        )


def call_function(function: Callable[..., Any], name: str, prompts: list[str], completions: list[str]) -> Any:
    """What a user's function gives for copies of the lists.

    Raises:
        RewardError: it raised; the line names the exception and where in the user's code it came from.
    """
    try:
        result = function(list(prompts), list(completions))
        return list(result) if isinstance(result, Iterator) else result
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise RewardError(f"{name} raised {_described(error)}; correct it and use --resume") from error


def _described(error: BaseException) -> str:
    """An exception in a line, with file and line of the user's code."""
    reason = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, SyntaxError):  # whose text names file and line
        return f"{kind}: {reason}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = ([frame for frame in frames if not _is_library(frame.filename)] or frames)[-1]
    return f"{kind}{': ' if reason else ''}{reason} ({frame.filename}:{frame.lineno})"


def _is_library(file: str) -> bool:
    path, libraries = Path(file), (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), PACKAGE)
    return file.startswith("<frozen") or any(path.is_relative_to(each) for each in libraries)
