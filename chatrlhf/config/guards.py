"""Guards: what makes a run skip a step, warn, or end because it is not learning what it should."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from chatrlhf.config.base import Section

Limits = tuple[float | None, float | None]


def _stop_is_above(limits: Limits) -> Limits:
    return _ordered(limits, above=True)


def _stop_is_below(limits: Limits) -> Limits:
    return _ordered(limits, above=False)


def _ordered(limits: Limits, above: bool) -> Limits:
    warn, stop = limits
    if warn is not None and stop is not None and (stop < warn if above else stop > warn):
        raise ValueError(
            f"[{warn:g}, {stop:g}]: the first is where it warns, the second where it stops, which must be "
            f"{'larger' if above else 'smaller'}; null is never"
        )
    return limits


Amount = Annotated[float, Field(ge=0, le=10**6)] | None
Share = Annotated[float, Field(ge=0, le=1)] | None
Explained = Annotated[float, Field(ge=-(10**6), le=1)] | None
Above = Annotated[tuple[Amount, Amount], AfterValidator(_stop_is_above)]
Below = Annotated[tuple[Amount, Amount], AfterValidator(_stop_is_below)]
ShareAbove = Annotated[tuple[Share, Share], AfterValidator(_stop_is_above)]
ShareBelow = Annotated[tuple[Share, Share], AfterValidator(_stop_is_below)]
ExplainedBelow = Annotated[tuple[Explained, Explained], AfterValidator(_stop_is_below)]


class GuardsConfig(Section):
    """When a run says that something is wrong with it, and when it ends for that reason.

    Two numbers are where a figure is warned of and where it ends the run; null: never.
    """

    skipped_steps: int = Field(
        3, ge=1, le=1000, description="steps in a row whose loss or gradient is not finite, at which a stage ends"
    )
    allow_untrained_actor: bool = Field(False, description="start RL although the actor's held-out loss has not fallen")
    stop_at_coin_flip: bool = Field(
        False, description="do not start RL where the reward model orders held-out replies no better than a coin"
    )
    silence: Above = Field(
        (600.0, None), description="seconds without progress at which it is said what hangs, and the process ends"
    )
    window: int = Field(10, ge=1, le=10_000, description="RL steps whose median is compared with the bands below")
    kl_per_token: Above = Field((1.0, 5.0), description="KL to the SFT actor, nats a token (k3)")
    kl_per_reply: Above = Field((100.0, None), description="KL to the SFT actor, nats a reply (k3)")
    entropy: Below = Field((0.01, None), description="of the policy, nats a token")
    repetition: ShareAbove = Field(
        (0.5, None), description="share of a reply's 4-grams of tokens that it has said before"
    )
    distinct_2: ShareBelow = Field((0.005, None), description="different pairs of tokens as a share of all in a batch")
    length_change: Above = Field((4.0, None), description="reply length against the first steps', as a factor")
    finished_drop: ShareAbove = Field((0.5, None), description="by how much the share of finished replies has fallen")
    clip_fraction: ShareAbove = Field((0.5, None), description="share of tokens whose ratio is clipped")
    explained_variance: ExplainedBelow = Field((-1.0, None), description="of the returns by the critic")
    flat_rewards: ShareAbove = Field((0.5, None), description="1 where all replies of a batch have one reward, else 0")
    forgotten: Above = Field(
        (2.0, None),
        description="rise of the loss on held-out demonstrations while the reward rises, nats a token; of --type ALL",
    )
