"""Guards of the RL loop: figures of a step that stay inside bands, or are warned of, or end the run.

A band is compared with the median over the last steps, so that one batch does not ring it. What counts from where the
run began (reply length, share finished) is compared with the median of its first steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from chatrlhf.config.guards import GuardsConfig

Metrics = Mapping[str, float]
# A step's figure, given its metrics and the medians of the first steps; None where it has none.
Figure = Callable[[Metrics, Metrics], float | None]


@dataclass(frozen=True)
class Guard:
    """One figure. ``name`` is its key in `guards_config`, whose two numbers are where it warns and where it stops."""

    name: str
    figure: Figure
    says: str  # to people, with {value}
    remedy: str
    below: bool = False  # a figure that is too small, rather than too large

    def is_beyond(self, value: float, limit: float | None) -> bool:
        return limit is not None and (value < limit if self.below else value > limit)


def _metric(name: str) -> Figure:
    return lambda metrics, _: metrics.get(name)


def _length_change(metrics: Metrics, start: Metrics) -> float | None:
    now, then = metrics.get("response/length"), start.get("response/length")
    if not now or not then:
        return None
    return max(now / then, then / now)


def _finished_drop(metrics: Metrics, start: Metrics) -> float | None:
    if "response/finished" not in metrics or "response/finished" not in start:
        return None
    return start["response/finished"] - metrics["response/finished"]


def _flat_rewards(metrics: Metrics, _: Metrics) -> float | None:
    return float(metrics["reward/std"] == 0) if "reward/std" in metrics else None


STRONGER_KL = "raise trainer_config.init_kl_coef, or lower actor_lr"
GUARDS = (
    Guard("kl_per_token", _metric("kl/token"), "the KL to the SFT actor is {value:.2f} nats a token", STRONGER_KL),
    Guard("kl_per_reply", _metric("kl/ref"), "the KL to the SFT actor is {value:.1f} nats a reply", STRONGER_KL),
    Guard(
        "entropy",
        _metric("ppo/entropy"),
        "the policy's entropy is {value:.4f} nats a token: it samples the same replies again and again",
        "raise trainer_config.entropy_coef or init_kl_coef",
        below=True,
    ),
    Guard("repetition", _metric("response/repetition"), "{value:.0%} of a reply's 4-grams repeat", STRONGER_KL),
    Guard(
        "distinct_2",
        _metric("response/distinct_2"),
        "only {value:.2%} of the token pairs of a batch differ",
        STRONGER_KL,
        below=True,
    ),
    Guard(
        "length_change",
        _length_change,
        "replies are {value:.1f} times as long, or as short, as at the start",
        "see whether the reward pays for length",
    ),
    Guard(
        "finished_drop",
        _finished_drop,
        "the share of replies that end by themselves has fallen by {value:.2f}",
        "set trainer_config.missing_eos_penalty, or raise gen_kwargs.max_new_tokens",
    ),
    Guard(
        "clip_fraction",
        _metric("ppo/clipfrac"),
        "{value:.0%} of the tokens are clipped",
        "lower trainer_config.actor_lr or ppo_epochs",
    ),
    Guard(
        "explained_variance",
        _metric("ppo/explained_variance"),
        "the critic explains {value:.2f} of the returns' variance: it is worse than their mean",
        "raise trainer_config.critic_lr, or set scale_reward: running",
        below=True,
    ),
    Guard(
        "flat_rewards",
        _flat_rewards,
        "all replies of a batch have the same reward, so nothing can be learned",
        "see what the reward gives (samples.jsonl)",
    ),
    Guard(
        "forgotten",
        _metric("eval/forgotten"),
        "the reward rises while the loss on held-out demonstrations rose by {value:.2f} nats a token",
        STRONGER_KL,
    ),
)
AT_ONCE = ("forgotten",)  # figures of an evaluation, of which there are few
FROM_START = ("response/length", "response/finished")


@dataclass
class Guards:
    """The guards of one run, with what they have seen."""

    keys: GuardsConfig
    warn: Callable[[str], None]
    windows: dict[str, list[float]] = field(default_factory=dict)  # by guard, the last steps' figures
    first: dict[str, list[float]] = field(default_factory=dict)  # by metric, of the first steps
    rung: dict[str, dict[str, Any]] = field(default_factory=dict)  # by guard: since, until, worst, is it ringing
    stopped: str | None = None  # why the run is to end

    def look(self, step: int, metrics: Metrics) -> dict[str, float]:
        """Compare a step's metrics with the bands.

        Returns:
            ``guard/<name>``: the median of each figure that is beyond where it warns.
        """
        for name in FROM_START:
            seen = self.first.setdefault(name, [])
            if name in metrics and len(seen) < self.keys.window:
                seen.append(metrics[name])
        start = {name: statistics.median(seen) for name, seen in self.first.items() if len(seen) == self.keys.window}
        beyond = {}
        for guard in GUARDS:
            value = self._median(guard, guard.figure(metrics, start))
            warn, stop = getattr(self.keys, guard.name)
            if value is None:
                continue
            if guard.is_beyond(value, warn) or guard.is_beyond(value, stop):
                beyond[f"guard/{guard.name}"] = value
                self._ring(guard, step, value, guard.is_beyond(value, stop))
            elif guard.name in self.rung:
                self.rung[guard.name]["rings"] = False
        return beyond

    def _median(self, guard: Guard, figure: float | None) -> float | None:
        """Of the last steps; None where there are too few, or this step has no figure."""
        if figure is None:
            return None
        if guard.name in AT_ONCE:
            return figure
        window = self.windows.setdefault(guard.name, [])
        window.append(figure)
        del window[: -self.keys.window]
        return statistics.median(window) if len(window) == self.keys.window else None

    def _ring(self, guard: Guard, step: int, value: float, stops: bool) -> None:
        said = guard.says.format(value=value)
        known = self.rung.get(guard.name)
        if known is None or not known["rings"]:
            self.warn(f"RL step {step}: {said} (guards_config.{guard.name}); {guard.remedy}")
        worst = value if known is None else (min if guard.below else max)(value, known["worst"])
        self.rung[guard.name] = {
            "since": known["since"] if known else step,
            "until": step,
            "worst": worst,
            "rings": True,
        }
        if stops:
            limit = getattr(self.keys, guard.name)[1]
            self.stopped = (
                f"RL step {step}: {said}, which guards_config.{guard.name} stops at ({limit:g}); {guard.remedy}"
            )

    def summary(self) -> list[str]:
        """A line for each guard that rang."""
        lines = []
        for guard in GUARDS:
            if guard.name in self.rung:
                known = self.rung[guard.name]
                until = "to the end" if known["rings"] else f"to step {known['until']}"
                lines.append(
                    f"{guard.name}: {guard.says.format(value=known['worst'])} (from step {known['since']} {until})"
                )
        return lines

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds, as JSON."""
        return {"windows": self.windows, "first": self.first, "rung": self.rung}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows, self.first, self.rung = state["windows"], state["first"], state["rung"]
