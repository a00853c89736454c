"""The run's verdict in words: what RL did to the actor, as far as the held-out prompts can tell.

Text that is broken is called so whatever its reward is. A gain is claimed only where its interval lies above zero.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from chatrlhf.functional.texts import is_broken, mean_interval, repeated_share
from chatrlhf.rl.held_out import HeldOutReport

FEWEST_PROMPTS = 8
MANY = 0.25  # share of replies that have to show a fault, beyond those that showed it before
REPEATED = 0.6  # share of a text's 6-grams that repeat, from which on it is called repetitive
SURPRISE = 2.5  # nats a token by which the SFT actor finds the replies less likely than its own
COLLAPSED = 0.34  # share of different replies, of what it was
UNFINISHED = 0.5  # share of replies that no longer end by themselves
FORGOTTEN = 2.0  # nats a token that held-out demonstrations cost more; a good run may forget most of one
EMPTY = 1  # characters at the most


@dataclass(frozen=True)
class Verdict:
    """``name`` is one of GIBBERISH, REPETITIVE, EMPTY, COLLAPSED, ENDLESS, OVER-OPTIMIZED, better, worse, unclear."""

    name: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"verdict: {self.name}. " + "; ".join(self.reasons)


def judge(before: HeldOutReport, after: HeldOutReport) -> Verdict:
    """The verdict on a policy, against the one before RL on the same prompts."""
    count = len(before.prompts)
    if count < FEWEST_PROMPTS:
        return Verdict("unclear", (f"{count} held-out prompts are too few for a claim ({FEWEST_PROMPTS} at least)",))
    gained, claims = _gains(before, after)
    faults = _faults(before, after)
    if faults:
        return Verdict(faults[0][0], (*(reason for _, reason in faults), *claims))
    if spoilt := _over_optimized(before, after):
        return Verdict("OVER-OPTIMIZED", (*spoilt, *claims))
    return Verdict({1: "better", -1: "worse", 0: "unclear"}[gained], tuple(claims))


def _faults(before: HeldOutReport, after: HeldOutReport) -> list[tuple[str, str]]:
    """Names and reasons, the worst first."""
    faults = []
    broken = _rise(before, after, is_broken)
    if broken is not None:
        faults.append(("GIBBERISH", f"{broken} have broken characters"))
    if before.reference_loss is not None and after.reference_loss is not None:
        surprise = after.reference_loss - before.reference_loss
        if surprise > SURPRISE:
            faults.append(
                (
                    "GIBBERISH",
                    f"to the SFT actor the replies are as unlikely as {after.reference_loss:.1f} nats a token, its own "
                    f"{before.reference_loss:.1f}",
                )
            )
    empty = _rise(before, after, lambda text: len(text.strip()) <= EMPTY)
    if empty is not None:
        faults.append(("EMPTY", f"{empty} say nothing"))
    repetitive = _rise(before, after, lambda text: repeated_share(text) > REPEATED)
    if repetitive is not None:
        faults.append(("REPETITIVE", f"{repetitive} repeat themselves"))
    if after.distinct <= COLLAPSED * before.distinct:
        faults.append(
            ("COLLAPSED", f"the share of different replies fell from {before.distinct:.2f} to {after.distinct:.2f}")
        )
    if before.finished - after.finished > UNFINISHED:
        faults.append(
            (
                "ENDLESS",
                f"the share of replies that end by themselves fell from {before.finished:.2f} to {after.finished:.2f}",
            )
        )
    return faults


def _rise(before: HeldOutReport, after: HeldOutReport, is_so: Callable[[str], bool]) -> str | None:
    """How many replies have become so, if they are many more than before."""
    then, now = (sum(map(is_so, report.completions)) for report in (before, after))
    if now - then < MANY * len(after.completions):
        return None
    return f"{now} of {len(after.completions)} replies (before RL {then})"


def _gains(before: HeldOutReport, after: HeldOutReport) -> tuple[int, list[str]]:
    """1 for better, -1 for worse, 0 where that cannot be told; and what is said of it."""
    named = [("learned reward", before.rewards, after.rewards)]
    if before.criteria and after.criteria:
        named.insert(0, ("true score", _totals(before), _totals(after)))
    signs, said = [], []
    for name, then, now in named:
        changes = [b - a for a, b in zip(then, now, strict=True)]
        low, high = mean_interval(changes)
        signs.append(1 if low > 0 else -1 if high < 0 else 0)
        said.append(
            f"the {name} changed by {statistics.fmean(changes):+.3g} (95 % interval {low:+.3g} to {high:+.3g}, "
            f"{len(changes)} prompts)"
        )
    said.append(f"KL {after.kl:.2f} nats a reply")
    return signs[0], said


def _over_optimized(before: HeldOutReport, after: HeldOutReport) -> list[str]:
    """Reasons to say that the reward was raised at the cost of what it stands for."""
    low, _ = mean_interval([b - a for a, b in zip(before.rewards, after.rewards, strict=True)])
    if low <= 0:
        return []
    reasons = []
    if before.criteria and after.criteria:
        low, high = mean_interval([b - a for a, b in zip(_totals(before), _totals(after), strict=True)])
        if low > 0:  # what the reward stands for has risen, too
            return []
        if high < 0:
            reasons.append("the reward rose and the true score fell")
    if before.demonstration_loss is not None and after.demonstration_loss is not None:
        rise = after.demonstration_loss - before.demonstration_loss
        if rise > FORGOTTEN:
            reasons.append(
                f"the reward rose and held-out demonstrations became less likely, by {rise:.2f} nats a token"
            )
    return reasons


def _totals(report: HeldOutReport) -> list[float]:
    """The sum of the criteria of each prompt."""
    return [sum(each) for each in zip(*report.criteria.values(), strict=True)]
