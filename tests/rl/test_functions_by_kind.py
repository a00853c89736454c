"""Reward functions of a hundred kinds: each is taken and gives its scores, or is one clear line before a run."""

from __future__ import annotations

import asyncio
import collections
import decimal
import fractions
import functools
import math
import random
import sys
import threading
import time
import types
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatrlhf.errors import ConfigError, FunctionError, NonFiniteRewardError, RewardError, UserError
from chatrlhf.rl.rewards import FunctionReward, resolve_reward_fn

PROMPTS, EXPECTED = ["Is it far?", "What does it cost?"], [12.0, 3.0]  # lengths of the replies of a trial


def lengths(prompts, completions):
    return [len(completion) for completion in completions]


def gives(make: Callable[[list[int]], Any]) -> Callable[..., Any]:
    """A function that makes its result of the lengths."""
    return lambda prompts, completions: make(lengths(prompts, completions))


def raises(error: BaseException) -> Callable[..., Any]:
    def function(prompts, completions):
        raise error

    return function


class Called:
    def __call__(self, prompts, completions):
        return lengths(prompts, completions)

    def method(self, prompts, completions):
        return lengths(prompts, completions)

    @classmethod
    def of_class(cls, prompts, completions):
        return lengths(prompts, completions)

    @staticmethod
    def static(prompts, completions):
        return lengths(prompts, completions)


class CalledWrongly:
    def __call__(self, samples, prompts, outputs):
        return [1.0]


class CalledLater:
    async def __call__(self, prompts, completions):
        return [1.0]


class Network(torch.nn.Module):
    def forward(self, prompts, completions):
        return torch.tensor(lengths(prompts, completions))


class Numbered:
    def __init__(self, value):
        self.value = value

    def __float__(self):
        return float(self.value)


class Unwilling:
    def __float__(self):
        raise RuntimeError("no")

    def __str__(self):
        raise RuntimeError("no text either")


class Row(float):
    pass


def generator(prompts, completions):
    yield from lengths(prompts, completions)


def endless(prompts, completions):
    while True:
        yield 1.0


async def later(prompts, completions):
    return lengths(prompts, completions)


async def later_one_by_one(prompts, completions):
    for each in completions:
        yield len(each)


@functools.wraps(lengths)
def wrapped(*args, **kwargs):
    return lengths(*args, **kwargs)


def mutating(prompts, completions):
    scores = lengths(prompts, completions)
    prompts.clear(), completions.clear()
    return scores


def recursive(prompts, completions):
    return recursive(prompts, completions)


TAKEN: dict[str, Callable[..., Any]] = {
    "a function": lengths,
    "a lambda": lambda prompts, completions: [len(each) for each in completions],
    "other names": lambda questions, answers: [len(each) for each in answers],
    "positional only": eval("lambda p, c, /: [len(each) for each in c]"),
    "any arguments": lambda *texts: [len(each) for each in texts[1]],
    "further words": lambda prompts, completions, **rest: lengths(prompts, completions),
    "a default": lambda prompts, completions, scale=1.0: [scale * each for each in lengths(prompts, completions)],
    "a partial": functools.partial(lambda scale, p, c: lengths(p, c), 2.0),
    "a partial by name": functools.partial(lambda p, c, *, scale: lengths(p, c), scale=2.0),
    "wrapped": wrapped,
    "cached by hand": functools.wraps(lengths)(lambda p, c: lengths(p, c)),
    "an object": Called(),
    "a method": Called().method,
    "a class method": Called.of_class,
    "a static method": Called.static,
    "a module of torch": Network(),
    "a generator": generator,
    "a method type": types.MethodType(lambda self, p, c: lengths(p, c), object()),
    "mutating": mutating,
    "printing": lambda p, c: print(end="") or lengths(p, c),
    "ints": gives(list),
    "floats": gives(lambda s: [float(each) for each in s]),
    "a tuple": gives(tuple),
    "an iterator": gives(iter),
    "a map": gives(lambda s: map(float, s)),
    "a zip of one": gives(lambda s: (each for (each,) in zip(s, strict=True))),
    "a range": gives(lambda s: range(12, 2, -9)),
    "a deque": gives(collections.deque),
    "decimals": gives(lambda s: [decimal.Decimal(each) for each in s]),
    "fractions": gives(lambda s: [fractions.Fraction(each) for each in s]),
    "numbers of numpy": gives(lambda s: [np.float64(each) for each in s]),
    "halves of numpy": gives(lambda s: [np.float16(each) for each in s]),
    "an array": gives(lambda s: np.array(s, dtype=np.float32)),
    "an array of ints": gives(np.array),
    "an array in a column": gives(lambda s: np.array(s)[:, None]),
    "a tensor": gives(torch.tensor),
    "a tensor in half precision": gives(lambda s: torch.tensor(s, dtype=torch.float16)),
    "a tensor in a column": gives(lambda s: torch.tensor(s)[:, None]),
    "a tensor with a gradient": gives(lambda s: torch.tensor(s, dtype=torch.float32, requires_grad=True)),
    "0-d tensors": gives(lambda s: list(torch.tensor(s))),
    "1-element tensors": gives(lambda s: [torch.tensor([each]) for each in s]),
    "numbers of a class": gives(lambda s: [Numbered(each) for each in s]),
    "a class of floats": gives(lambda s: [Row(each) for each in s]),
    "values of a dictionary": gives(lambda s: dict(enumerate(s)).values()),
    "mixed kinds": gives(lambda s: [np.int8(s[0]), torch.tensor(float(s[1]))]),
    "reseeding random": lambda p, c: random.seed(0) or lengths(p, c),
    "reseeding numpy": lambda p, c: np.random.seed(0) or lengths(p, c),
    "reseeding torch": lambda p, c: torch.manual_seed(0) and lengths(p, c),
    "in threads": lambda p, c: [threading.Thread(target=int).start() or len(each) for each in c],
    "by an event loop": lambda p, c: asyncio.run(later(p, c)),
    "catching everything": lambda p, c: lengths(p, c),
}

NO_FUNCTION = "is no function but of type"
KIND = "expected a list of numbers, got"
REFUSED: dict[str, tuple[Any, type[UserError], str]] = {
    "None": (None, ConfigError, f"{NO_FUNCTION} NoneType"),
    "a number": (3.0, ConfigError, f"{NO_FUNCTION} float"),
    "a list": ([1.0], ConfigError, f"{NO_FUNCTION} list"),
    "a name": ("lengths", ConfigError, f"{NO_FUNCTION} str"),
    "a module": (math, ConfigError, f"{NO_FUNCTION} module"),
    "an object": (object(), ConfigError, f"{NO_FUNCTION} object"),
    "a class": (Called, ConfigError, "is a class; give an instance"),
    "a class of Python's": (dict, ConfigError, "is a class"),
    "a coroutine function": (later, ConfigError, "is a coroutine function"),
    "a partial of one": (functools.partial(later), ConfigError, "is a coroutine function"),
    "an asynchronous generator": (later_one_by_one, ConfigError, "is a coroutine function"),
    "an object that answers later": (CalledLater(), ConfigError, "is a coroutine function"),
    "no arguments": (lambda: [], ConfigError, r"takes \(\), but is called with two"),
    "one argument": (lambda completions: [], ConfigError, "takes"),
    "three arguments": (lambda samples, prompts, outputs: [], ConfigError, "takes"),
    "the other order": (lambda completions, prompts: [], ConfigError, "takes"),
    "by name alone": (lambda *, prompts, completions: [], ConfigError, "takes"),
    "one more by name": (lambda a, b, *, c: [], ConfigError, "takes"),
    "only words": (lambda **words: [], ConfigError, "takes"),
    "an object of three": (CalledWrongly(), ConfigError, "takes"),
    "a function of math": (math.sqrt, ConfigError, "takes"),
    "a lambda that gives a coroutine": (lambda p, c: later(p, c), RewardError, f"{KIND} coroutine"),
    "nothing": (gives(lambda s: None), RewardError, f"{KIND} NoneType"),
    "one number": (gives(sum), RewardError, f"{KIND} int"),
    "a text": (gives(str), RewardError, f"{KIND} str"),
    "two letters": (gives(lambda s: "12"), RewardError, f"{KIND} str"),
    "bytes": (gives(lambda s: b"12"), RewardError, f"{KIND} bytes"),
    "texts": (gives(lambda s: [str(each) for each in s]), RewardError, f"{KIND} list"),
    "texts of numpy": (gives(lambda s: np.array(["1", "2"])), RewardError, f"{KIND} ndarray"),
    "a dictionary": (gives(lambda s: dict(enumerate(s))), RewardError, f"{KIND} dict"),
    "criteria": (gives(lambda s: [{"score": each} for each in s]), RewardError, f"{KIND} list"),
    "a set": (gives(set), RewardError, f"{KIND} set"),
    "pairs": (gives(lambda s: [(each, 1.0) for each in s]), RewardError, f"{KIND} list"),
    "lists": (gives(lambda s: [[each] for each in s]), RewardError, f"{KIND} list"),
    "a None among them": (gives(lambda s: [1.0, None]), RewardError, f"{KIND} list"),
    "complex numbers": (gives(lambda s: [1j, 2j]), RewardError, f"{KIND} list"),
    "a complex tensor": (gives(lambda s: torch.tensor([1j, 2j])), RewardError, f"{KIND} Tensor"),
    "a function": (gives(lambda s: len), RewardError, f"{KIND} builtin"),
    "an object as a score": (gives(lambda s: [object(), object()]), RewardError, f"{KIND} list"),
    "a score that raises": (gives(lambda s: [Unwilling(), 1.0]), RewardError, f"{KIND} list"),
    "a result without text": (gives(lambda s: Unwilling()), RewardError, f"{KIND} Unwilling"),
    "beyond a float": (gives(lambda s: [10**400, 1]), RewardError, f"{KIND} list"),
    "an exception as its result": (gives(lambda s: ValueError("x")), RewardError, f"{KIND} ValueError"),
    "a 0-d tensor": (gives(lambda s: torch.tensor(1.0)), RewardError, "returned 1 scores for 2"),
    "too few": (gives(lambda s: s[:1]), RewardError, "returned 1 scores for 2"),
    "none at all": (gives(lambda s: []), RewardError, "returned 0 scores for 2"),
    "too many": (gives(lambda s: [*s, 1]), RewardError, "returned 3 scores for 2"),
    "an endless generator": (endless, RewardError, "returned 3 scores for 2"),
    "a table": (gives(lambda s: torch.ones(2, 2)), RewardError, "returned 4 scores for 2"),
    "a table of numpy": (gives(lambda s: np.ones((2, 3))), RewardError, "returned 6 scores for 2"),
    "NaN": (gives(lambda s: [math.nan, 1.0]), NonFiniteRewardError, "score 0 is nan"),
    "NaN of numpy": (gives(lambda s: np.array([1.0, np.nan])), NonFiniteRewardError, "score 1 is nan"),
    "infinity": (gives(lambda s: [1.0, math.inf]), NonFiniteRewardError, "score 1 is inf"),
    "minus infinity": (gives(lambda s: torch.tensor([-math.inf, 1])), NonFiniteRewardError, "score 0 is -inf"),
    "beyond float32": (gives(lambda s: [1e300, 1.0]), NonFiniteRewardError, "score 0 is 1e"),
    "NaN as a decimal": (gives(lambda s: [decimal.Decimal("NaN"), 1]), NonFiniteRewardError, "score 0 is nan"),
    "a ValueError": (raises(ValueError("bad")), FunctionError, r"raised ValueError: bad \(.*at row 0"),
    "a KeyError": (lambda p, c: {}["k"], FunctionError, "raised KeyError: 'k'"),
    "a ZeroDivisionError": (lambda p, c: 1 / 0, FunctionError, "raised ZeroDivisionError"),
    "an AssertionError": (raises(AssertionError()), FunctionError, r"raised AssertionError \("),
    "an OSError": (lambda p, c: Path("/no/such/file").read_text(), FunctionError, "raised FileNotFoundError"),
    "an ImportError": (lambda p, c: __import__("no_such_module"), FunctionError, "raised ModuleNotFoundError"),
    "a MemoryError": (raises(MemoryError()), FunctionError, "raised MemoryError"),
    "a StopIteration": (raises(StopIteration()), FunctionError, "raised StopIteration"),
    "a NotImplementedError": (raises(NotImplementedError()), FunctionError, "raised NotImplementedError"),
    "sys.exit": (raises(SystemExit(1)), FunctionError, "raised SystemExit: 1"),
    "an error of torch": (lambda p, c: torch.ones(2) @ torch.ones(3), FunctionError, "raised RuntimeError"),
    "endless recursion": (recursive, FunctionError, "raised RecursionError"),
    "an error of many lines": (raises(ValueError("a\nb\n\tc")), FunctionError, "raised ValueError: a b c"),
    "an index beyond": (lambda p, c: [c[i] for i in range(9)], FunctionError, "raised IndexError"),
    "a builtin without a signature": (max, RewardError, f"{KIND} list"),
}


@pytest.mark.parametrize("kind", TAKEN)
def test_what_is_taken_gives_its_scores(kind):
    reward = FunctionReward(TAKEN[kind], kind, 60.0)
    reward.try_out(PROMPTS)
    assert reward.texts(PROMPTS, ["Yes, it is f", "No."]).tolist() == EXPECTED


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_is_one_line_before_models_are_read(kind):
    function, error, said = REFUSED[kind]
    with pytest.raises(error, match=said) as caught:
        FunctionReward(function, kind, 60.0).try_out(PROMPTS)
    line = str(caught.value)
    assert "\n" not in line and f"the reward function {kind}" in line and len(line) < 500


@pytest.mark.parametrize("name", ["os:system", "builtins:print", "subprocess:run", "os.path:join", "shutil:move"])
def test_a_function_of_pythons_own_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=f"^reward_config.reward_fn: {name} is Python's own"):
        resolve_reward_fn(name)


@pytest.mark.parametrize("bad", [0, 3, 7])
def test_the_row_that_brings_an_exception_about_is_named(bad):
    completions = [f"reply {i}" * 40 for i in range(8)]

    def picky(prompts, completions):
        if any(completion.startswith(f"reply {bad}") for completion in completions):
            raise ValueError("not this")
        return lengths(prompts, completions)

    row = rf"at row {bad} \(prompt 'question {bad}', completion 'reply {bad}.*\.\.\.'\); correct it"
    said = rf"raised ValueError: not this .* {row}"
    with pytest.raises(FunctionError, match=said) as caught:
        FunctionReward(picky, "picky").texts([f"question {i}" for i in range(8)], completions)
    assert "in picky" in caught.value.details and len(str(caught.value)) < 400


def test_rows_that_fail_together_alone_are_not_blamed_one_by_one():
    def at_most_one(prompts, completions):
        if len(completions) > 1:
            raise ValueError("too many")
        return [1.0]

    with pytest.raises(FunctionError) as caught:
        FunctionReward(at_most_one, "f").texts(["a", "b"], ["c", "d"])
    assert "at row" not in str(caught.value)


# ----- time


@pytest.mark.parametrize("kind", ["sleeps", "loops", "swallows", "waits"])
def test_a_function_that_hangs_is_named_with_its_time(kind):
    def sleeps():
        time.sleep(30)

    def loops():
        while True:
            pass

    def swallows():
        while True:
            with suppress(Exception):
                time.sleep(30)

    def waits():
        threading.Event().wait(30)

    hang = {"sleeps": sleeps, "loops": loops, "swallows": swallows, "waits": waits}[kind]
    began = time.monotonic()
    with pytest.raises(RewardError, match=r"the reward function f has not answered within 0\.1 seconds \(2 rows"):
        FunctionReward(lambda p, c: hang(), "f", 0.1).texts(["a", "b"], ["c", "d"])
    assert time.monotonic() - began < 5


HANGS_IN_C = """
import sys, threading
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.runtime import time_limit
time_limit.GRACE = 0.3
def hangs(prompts, completions):
    while True:
        try:
            threading.Event().wait()
        except BaseException:
            pass
call = lambda: FunctionReward(hangs, "f", 0.2).texts(["a"], ["b"])
if sys.argv[1] == "thread":
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
else:
    call()
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["main", "thread"])
def test_what_cannot_be_interrupted_ends_the_process_with_a_line(where):
    import subprocess

    done = subprocess.run([sys.executable, "-c", HANGS_IN_C, where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: the reward function f has not answered within 0.2 seconds (1 rows")


def test_another_timer_goes_on_behind_a_call():
    import signal

    rung: list[int] = []
    before, rest = signal.signal(signal.SIGALRM, lambda *_: rung.append(1)), signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        FunctionReward(lengths, "f", 60.0).texts(["a"], ["b"])
        time.sleep(0.4)
        assert rung == [1]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *rest)


# ----- generators


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.mark.parametrize("kind", ["draws nothing", "draws", "reseeds"])
def test_what_a_function_draws_or_seeds_changes_no_draw_of_the_run(kind):
    def function(prompts, completions):
        if kind == "reseeds":
            random.seed(0), np.random.seed(0), torch.manual_seed(0)
        if kind != "draws nothing":
            drawn()
        return lengths(prompts, completions)

    def draws_behind(function) -> tuple[float, float, float]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        FunctionReward(function, "f").texts(["a"], ["b"])
        return drawn()

    assert draws_behind(function) == draws_behind(lengths)


def test_a_function_draws_anew_each_time_and_the_same_in_the_same_run():
    seen: list[tuple[float, ...]] = []
    reward = FunctionReward(lambda p, c: seen.append(drawn()) or [1.0], "f")
    for _ in range(2):
        random.seed(1), np.random.seed(5), torch.manual_seed(6)
        reward.texts(["a"], ["b"])
        reward.texts(["a"], ["b"])
    assert seen[:2] == seen[2:] and len({each for draws in seen[:2] for each in draws}) == 6
