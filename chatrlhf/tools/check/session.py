"""Session of checks: one configuration, its rows and where models go; nothing is written into the user's folders."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from chatrlhf.config.schema import ActorConfig, Config
from chatrlhf.data.inputs import Inputs
from chatrlhf.models.classifier import is_used_as_it_is
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.runtime.collectives import start
from chatrlhf.runtime.device import pick_device
from chatrlhf.runtime.manifest import Manifest
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.seeding import generator_states, set_generator_states
from chatrlhf.stages.context import RunContext


@dataclass
class Session:
    """What all checks of a configuration share.

    Args:
        scratch: a folder that is removed afterwards.
        deep: checks that train are made, too.
    """

    config: Config
    stages: list[str]
    scratch: Path
    deep: bool = False
    failed: set[str] = field(default_factory=set)  # names of groups that others build on

    _inputs: Inputs | None = None

    @property
    def inputs(self) -> Inputs:
        """The rows, once the group that reads them was there."""
        assert self._inputs is not None
        return self._inputs

    @inputs.setter
    def inputs(self, inputs: Inputs) -> None:
        self._inputs = inputs

    @property
    def is_classifier(self) -> bool:
        """Whether the reward is a classifier that no stage trains."""
        reward = self.config.reward_config
        return reward.reward_fn is None and is_used_as_it_is(reward, self.stages, self.config.run_dir / "reward")

    @property
    def has_function(self) -> bool:
        """Whether no reward model of this package is needed."""
        return self.config.reward_config.reward_fn is not None or self.is_classifier

    @property
    def trains_reward(self) -> bool:
        return "REWARD" in self.stages and not self.has_function

    @cached_property
    def device(self) -> torch.device:
        start()
        return pick_device()

    def context(self, reward: FunctionReward | None = None) -> RunContext:
        """As a run's, but for the log, which is silent, and in the scratch folder.

        Its folder is the run's, which a stage that is not trained again is read from.
        """
        log = RunLog(self.scratch)
        log.console = Console(quiet=True)
        is_continued = "ACTOR" not in self.stages
        manifest = Manifest.open(self.config.run_dir, False) if is_continued else Manifest(self.scratch)
        return RunContext(self.config, self.inputs, log, manifest, self.device, reward, False, self.stages)

    def start(self) -> ActorConfig:
        """The actor's settings with the model that it starts from."""
        return self.context().start()


@contextmanager
def same_random_numbers(seed: int) -> Iterator[None]:
    """Inside, the global generators begin anew; behind it they are as before."""
    from transformers import set_seed

    states = generator_states()
    set_seed(seed)
    try:
        yield
    finally:
        set_generator_states(states)
