"""The scale that scores are divided by, and its state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from chatrlhf.functional.rewards import shape_scores


@dataclass
class RewardScaling:
    """Clips, scales and penalizes scores; ``running`` and ``ref`` as in trlX.

    ``running`` divides by the standard deviation of all scores seen so far, ``ref`` by that of the first
    rollout batch (the reference model's own) or by a given one. The mean is never subtracted.
    """

    mode: Literal["running", "ref"] | None = None
    cliprange: float | None = None
    missing_eos_penalty: float | None = None
    ref_std: float | None = None
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared deviations from the mean
    first_std: float | None = None  # of the first rollout batch; None before it

    def __call__(self, raw_scores: Tensor, finished: Tensor) -> Tensor:
        """The scores [B] that enter the rewards; sees each rollout batch once."""
        clipped = raw_scores if self.cliprange is None else raw_scores.clamp(-self.cliprange, self.cliprange)
        self._observe(clipped)
        return shape_scores(raw_scores, finished, self.cliprange, self.scale, self.missing_eos_penalty)

    @property
    def scale(self) -> float:
        """What scores are divided by; 1 until two different scores were seen."""
        if self.mode is None:
            return 1.0
        if self.mode == "ref" and self.ref_std is not None:
            return self.ref_std
        std = self.first_std if self.mode == "ref" else self._std()
        return std if std else 1.0

    def _std(self) -> float:
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0

    def _observe(self, scores: Tensor) -> None:
        """Merge a batch into the running moments (Chan et al. 1979, parallel variance), whatever the mode: a resumed
        run may change it."""
        size, mean = len(scores), float(scores.double().mean())
        squares = float(((scores.double() - mean) ** 2).sum())
        delta, total = mean - self.mean, self.count + size
        self.squares += squares + delta**2 * self.count * size / total
        self.mean += delta * size / total
        self.count = total
        if self.first_std is None:
            self.first_std = self._std()

    def state_dict(self) -> dict[str, Any]:
        names = ("count", "mean", "squares", "first_std")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
        # In checkpoints of earlier versions, which saw the first batch alone where its deviation is what counts.
        self.first_std = state.get("first_std", self._std() if self.count else None)
