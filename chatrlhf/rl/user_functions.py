"""Functions that a user's configuration names: found by name, checked before the run, called with errors explained."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from chatrlhf.errors import ConfigError, FunctionError, RewardError, UserError
from chatrlhf.runtime.import_path import hidden_by_stdlib, put_behind_stdlib
from chatrlhf.runtime.seeding import generators_apart
from chatrlhf.runtime.time_limit import TimeIsUp, within
from chatrlhf.runtime.watchdog import newest_phase

CALL = "(prompts, completions)"
SEARCH_SECONDS, MOST_TRIED = 30.0, 64  # for the row at which a function fails: seconds in all, and rows
SHOWN_CHARS = 60
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
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ConfigError(f"{key}: {name} is Python's own, and judges no texts; name a function in a file of yours")
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
    if not callable(function):
        raise ConfigError(f"{name} is no function but {_kind(function)}; give a function of {CALL}")
    if isinstance(function, type):
        raise ConfigError(f"{name} is a class; give an instance of it that can be called, or a function of {CALL}")
    called = (function, type(function).__call__)  # of an object its method
    if any(map(inspect.iscoroutinefunction, called)) or any(map(inspect.isasyncgenfunction, called)):
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


def call_function(
    function: Callable[..., Any],
    name: str,
    prompts: list[Any],
    completions: list[str],
    seconds: float | None = None,
    then: str = "correct it and use --resume",
) -> Any:
    """What a user's function gives for copies of the lists; it has random generators of its own.

    Args:
        seconds: that it may take; None: any time.
        then: what to do where it fails, for people.

    Raises:
        RewardError: it took longer; or, a FunctionError, it raised: the line names the exception, where in the user's
            code it came from, and the row where one row alone brings it about.
    """
    late = (
        f"{name} has not answered within {seconds or 0:g} seconds ({len(completions)} rows, since: {newest_phase()}); "
        f"{then}, or raise reward_config.reward_timeout"
    )
    try:
        return _called(function, prompts, completions, seconds, late)
    except UserError:
        raise
    except TimeIsUp:
        raise RewardError(late) from None
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        row = _row_of(error, function, prompts, completions, seconds, late)
        details = "".join(traceback.format_exception(error))
        raise FunctionError(f"{name} raised {_described(error)}{row}; {then}", details) from error


def _called(
    function: Callable[..., Any], prompts: list[Any], completions: list[str], seconds: float | None, late: str
) -> Any:
    with within(seconds, late), generators_apart():
        result = function(list(prompts), list(completions))
        # A generator may have no end; one result too many is enough to see that.
        return list(islice(result, len(completions) + 1)) if isinstance(result, Iterator) else result


def _row_of(
    error: BaseException,
    function: Callable[..., Any],
    prompts: list[Any],
    completions: list[str],
    seconds: float | None,
    late: str,
) -> str:
    """The first row that brings the same error about by itself, for people; "" where none is found in a short time."""
    if not isinstance(error, Exception) or not all(isinstance(prompt, str) for prompt in prompts):
        return ""
    deadline = time.monotonic() + min(SEARCH_SECONDS, seconds or SEARCH_SECONDS)
    for i, (prompt, completion) in enumerate(zip(prompts[:MOST_TRIED], completions, strict=False)):
        rest = deadline - time.monotonic()
        if rest <= 0:
            break
        try:
            _called(function, [prompt], [completion], rest, late)
        except TimeIsUp:
            break
        except Exception as again:
            if type(again) is type(error):
                return f" at row {i} (prompt {_start(prompt)}, completion {_start(completion)})"
        except SystemExit:
            break
    return ""


def _start(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}...")


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"


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
