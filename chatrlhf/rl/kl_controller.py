"""The coefficient of the KL term, fixed or steered towards a target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class KLController:
    """beta, adapted after each rollout batch (Ziegler et al. 2019, section 2.2):

        e = clip(KL / target - 1, -0.2, 0.2);  beta <- beta (1 + e n / horizon)

    with KL in nats per sequence and n sequences in the batch. Without a target beta stays where it is.
    """

    coef: float
    target: float | None = None
    horizon: int = 10000

    def __post_init__(self) -> None:
        self.init = self.coef

    def update(self, kl: float, num_sequences: int) -> None:
        """Steer by the KL (nats per sequence) of ``num_sequences`` rollouts."""
        if self.target is None:
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef, "init": self.init}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the adapted coefficient, unless the configuration now asks for another initial one, which holds
        from here on. Target and horizon are the configuration's."""
        if state.get("init", self.init) == self.init:
            self.coef = state["coef"]
