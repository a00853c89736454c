"""Progress of an RL run in episodes, prompts and optimizer steps: what a step was depends on the settings of then."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chatrlhf.config.rl import TrainerConfig
from chatrlhf.errors import ConfigError
from chatrlhf.errors.boundary import doing

STATE = "state.json"  # of a checkpoint


@dataclass(frozen=True)
class Progress:
    """What was done before a run is resumed."""

    steps: int = 0
    episodes: int = 0
    prompts: int = 0
    optimizer_steps: int = 0

    @staticmethod
    def of(checkpoint: Path | None, config: TrainerConfig) -> Progress:
        """Of a checkpoint; nothing without one. Those of earlier versions were written under these very settings."""
        if checkpoint is None:
            return Progress()
        with doing("RL: reading the checkpoint", checkpoint, untrusted=True):
            state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
            if "progress" in state:
                return Progress(**state["progress"])
            steps = int(state["step"])
        assert config.samples_per_prompt is not None  # the schema fills it in
        return Progress().after(steps, config.num_rollouts, config.samples_per_prompt, _minibatches(config))

    def after(self, steps: int, num_rollouts: int, samples_per_prompt: int, minibatches: int) -> Progress:
        """As it is after more steps, of so many sequences and optimizer steps each."""
        return Progress(
            self.steps + steps,
            self.episodes + steps * num_rollouts,
            self.prompts + steps * (num_rollouts // samples_per_prompt),
            self.optimizer_steps + steps * minibatches,
        )

    def num_steps(self, config: TrainerConfig) -> int:
        """Steps of the whole run: these, and those that make the episodes that are left.

        Raises:
            ConfigError: `num_rollouts` does not divide those.
        """
        assert config.total_episodes is not None  # the schema fills it in
        left = max(config.total_episodes - self.episodes, 0)
        if left % config.num_rollouts:  # it divides all episodes, so what is wrong is those that are done
            fitting = [n for n in range(1, self.episodes + 1) if self.episodes % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - config.num_rollouts))[:3])
            raise ConfigError(
                f"trainer_config.num_rollouts: {config.num_rollouts} does not divide the {left} episodes that are left "
                f"({self.episodes} of {config.total_episodes} are done); set it to one of {', '.join(map(str, near))}"
            )
        return self.steps + left // config.num_rollouts

    def num_optimizer_steps(self, config: TrainerConfig) -> int:
        """Optimizer steps of the whole run; the horizon of the schedule."""
        return self.optimizer_steps + (self.num_steps(config) - self.steps) * _minibatches(config)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


def _minibatches(config: TrainerConfig) -> int:
    """Optimizer steps of one step."""
    assert config.batch_size is not None  # the schema fills it in
    return config.ppo_epochs * (config.num_rollouts // config.batch_size)
