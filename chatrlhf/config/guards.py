"""Guards: what makes a run skip a step, warn, or end because it is not learning what it should."""

from __future__ import annotations

from pydantic import Field

from chatrlhf.config.base import Section


class GuardsConfig(Section):
    """When a run says that something is wrong with it, and when it ends for that reason."""

    skipped_steps: int = Field(
        3, ge=1, le=1000, description="steps in a row whose loss or gradient is not finite, at which a stage ends"
    )
    allow_untrained_actor: bool = Field(False, description="start RL although the actor's held-out loss has not fallen")
    stop_at_coin_flip: bool = Field(
        False, description="do not start RL where the reward model orders held-out replies no better than a coin"
    )
