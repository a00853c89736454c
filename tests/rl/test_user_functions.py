"""A user's functions: refused before the run where they cannot be called, explained where they raise."""

from __future__ import annotations

import functools
import math
import sys

import pytest

from chatrlhf.errors import ConfigError, RewardError
from chatrlhf.rl.held_out import _criteria
from chatrlhf.rl.rewards import FunctionReward, resolve_reward_fn
from chatrlhf.rl.user_functions import call_function, check_signature


class Callable:
    def __call__(self, prompts, completions, model=None):
        return [1.0] * len(completions)


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, completions: [],
        lambda a, b, c=3, *, d=4: [],
        lambda *texts: [],
        lambda prompts, completions, **rest: [],  # TRL's
        functools.partial(lambda scale, prompts, completions: [], 2.0),
        Callable(),
        Callable().__call__,
        max,  # written in C, and without a signature
    ],
)
def test_what_can_be_called_with_prompts_and_completions_is_taken(function):
    check_signature(function, "f")


async def asynchronous(prompts, completions):
    return []


@pytest.mark.parametrize(
    "function, said",
    [
        (
            lambda samples, prompts, outputs: [],
            r"takes \(samples, prompts, outputs\), but is called .*\(prompts, c",
        ),
        (lambda samples, **rest: [], r"takes \(samples, \*\*rest\)"),
        (lambda samples, prompts=None, outputs=None: [], "takes"),  # would take completions for prompts
        (lambda completions, prompts: [], "takes"),
        (lambda completions, **rest: [], "takes"),
        (lambda *, prompts, completions: [], "takes"),
        (lambda a, b, *, c: [], "takes"),
        (lambda: [], r"takes \(\)"),
        (math.sqrt, "takes"),
        (asynchronous, "is a coroutine function"),
    ],
)
def test_what_cannot_is_refused_before_the_run(function, said):
    with pytest.raises(ConfigError, match=f"^the reward function f {said}"):
        FunctionReward(function, "f")


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's, and gives the reward function in it."""

    def write(text: str):
        (tmp_path / "theirs.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "theirs", raising=False)
        return resolve_reward_fn("theirs:score")

    return write


@pytest.mark.parametrize(
    "line, said",
    [
        ("return [1 / 0]", "ZeroDivisionError: division by zero"),
        ("return {}[0]", "KeyError: 0"),
        ("assert prompts == 3", r"AssertionError \("),
        ("import json; return json.loads('{')", "JSONDecodeError: Expecting property name"),  # raised in a library
        ("yield [][1]", "IndexError: list index out of range"),  # raised when it is read
        ("raise Exception('two\\n  lines')", "Exception: two lines"),
    ],
)
def test_what_the_users_code_raises_is_one_line_with_its_place(module, line, said):
    reward = module(f"def score(prompts, completions):\n    x = 1\n    {line}\n")
    with pytest.raises(RewardError, match=rf"^the reward function theirs:score raised {said}.*theirs.py:3\)") as caught:
        reward.texts(["a"], ["b"])
    assert "\n" not in str(caught.value) and caught.value.__cause__ is not None


@pytest.mark.parametrize(
    "text, said",
    [
        ("def score(prompts, completions:\n", "SyntaxError: .*theirs.py, line 1"),
        ("x = 1\nundefined\n", r"NameError: name 'undefined' is not defined \(.*theirs.py:2\)"),
        ("import nothing_of_this_name\n", "No module named 'nothing_of_this_name'"),
        ("def score(samples, prompts, outputs): pass\n", "takes"),
    ],
)
def test_a_module_that_cannot_be_used_is_one_line_with_the_key(module, text, said):
    with pytest.raises(ConfigError, match=f"^reward_config.reward_fn: .*{said}"):
        module(text)


def test_a_refusal_of_our_own_keeps_its_text():
    def refuses(prompts, completions):
        raise RewardError("as it is")

    with pytest.raises(RewardError, match="^as it is$"):
        call_function(refuses, "f", [], [])


@pytest.mark.parametrize(
    "results, said",
    [
        ([1.0, None], "score is None .completion 'second'"),
        ([1.0, "2"], "score is '2'"),
        ([{"a": 1}, {"b": 2}], "a completion lacks the criterion 'a'"),
        ([{"a": 1}, {"a": math.nan}], "a is nan .completion 'second'"),
        ([1.0], "returned 1 results for 2 completions"),
        (None, "expected a list of numbers or of criteria, got None"),
    ],
)
def test_criteria_have_to_be_finite_numbers(results, said):
    with pytest.raises(RewardError, match=f"^trainer_config.eval_fn:? {said}"):
        _criteria(lambda prompts, completions: results, ["p", "q"], ["first", "second"])
