"""Named places of a run, where a test kills it, signals it or looks on: so that no test patches what is inside.

A place is a line ``reached("rl.optimizer_step")``. Nothing happens there, unless somebody in the same process has said
with `at` what should.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What has just happened, or is about to; and what the action is given.
PLACES = {
    "run.stage": "a stage is about to run: its name",
    "rollout.draw": "before a token of each row is drawn",
    "rl.optimizer_step": "before a minibatch's backward and step",
    "rl.gradients": "a minibatch's gradients are there, before they are clipped: the actor-critic",
    "rl.steps": "before the first step of RL, a checkpoint's state is taken up: the trainer",
    "rl.step": "before a step's metrics are recorded: the step's number",
    "rl.weights_saved": "a checkpoint has its weights and nothing else: its folder",
    "trainer.gradients": "before an optimizer step of transformers' Trainer: the model",
    "trainer.log": "before transformers' Trainer logs",
    "trainer.step": "behind an optimizer step of transformers' Trainer: its number",
    "trainer.publish": "before one of a checkpoint's files is moved to its place",
    "reward_model.head": "before a reward model's head is written, behind its backbone: the folder",
    "manifest.set_aside": "a stage's earlier results are moved, their folder is not yet in its place: the place",
    "publish.between_renames": "the old folder is moved aside, the new one not yet in its place: the place",
}
_actions: dict[str, Callable[..., None]] = {}


def reached(place: str, *facts: Any) -> None:
    """The run is at one of the places."""
    if place in _actions:
        _actions[place](*facts)


def at(place: str, action: Callable[..., None], call: int | None = None) -> Callable[[], None]:
    """Have ``action`` called at a place, whenever the run is there or the ``call``-th time alone, from 1.

    Returns:
        What ends it.

    Raises:
        ValueError: there is no such place.
    """
    if place not in PLACES:
        raise ValueError(f"expected one of {', '.join(PLACES)}, got {place!r}")
    calls = 0

    def counted(*facts: Any) -> None:
        nonlocal calls
        calls += 1
        if call in (None, calls):
            action(*facts)

    _actions[place] = counted
    return lambda: _actions.pop(place, None)
