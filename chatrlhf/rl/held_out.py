"""A policy on held-out prompts: what it says, the learned reward, the true criteria, its distance to the reference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from chatrlhf.errors import RewardError
from chatrlhf.functional.kl import k1, kl_of_replies
from chatrlhf.functional.masked import masked_mean
from chatrlhf.rl.data_parallel import rollout_rows
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.user_functions import call_function
from chatrlhf.rollout.sampler import Sampler
from chatrlhf.runtime.collectives import gather_results, is_main
from chatrlhf.types import PromptBatch, Rollout

EVAL_FN = "trainer_config.eval_fn"

# Criteria of each completion; a plain number a completion is taken as the one criterion "score".
EvalFunction = Callable[[list[str], list[str]], Sequence[Mapping[str, float] | float]]


@dataclass
class HeldOutReport:
    """One policy on the held-out prompts; plain values only, so that a checkpoint can carry it as JSON."""

    prompts: list[str]
    completions: list[str]
    rewards: list[float]
    kl: float  # nats per sequence, by k3
    length: float  # tokens
    finished: float  # share
    distinct: float  # different completions, as a share of all
    criteria: dict[str, list[float]] = field(default_factory=dict)  # by name, one number a prompt
    kl_k1: float | None = None  # the same by k1, as the controller has it
    reference_loss: float | None = None  # nats a token that the reference would need for these completions
    demonstration_loss: float | None = None  # nats a token of held-out demonstrations, where there are any

    @property
    def reward(self) -> float:
        return statistics.fmean(self.rewards)

    @property
    def reward_std(self) -> float:
        """Standard deviation of the rewards over the prompts."""
        return statistics.pstdev(self.rewards)

    @property
    def true_score(self) -> float | None:
        """Mean sum of the criteria; None without an `eval_fn`."""
        if not self.criteria:
            return None
        return sum(map(sum, self.criteria.values())) / len(self.prompts)

    def metrics(self) -> dict[str, float]:
        """Under the names they are logged by."""
        values = {
            "eval/reward": self.reward,
            "eval/reward_std": self.reward_std,
            "eval/kl": self.kl,
            "eval/length": self.length,
            "eval/finished": self.finished,
            "eval/distinct": self.distinct,
        }
        more = {
            "eval/kl_k1": self.kl_k1,
            "eval/reference_loss": self.reference_loss,
            "eval/demonstration_loss": self.demonstration_loss,
            "eval/true_score": self.true_score,
        }
        values |= {name: value for name, value in more.items() if value is not None}
        return values | {f"eval/{name}": sum(each) / len(each) for name, each in self.criteria.items()}

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class HeldOut:
    """The held-out prompts and how their completions are judged."""

    prompts: PromptBatch
    engine: Sampler
    scorer: Scorer
    eval_fn: EvalFunction | None
    seed: int
    demonstrations: Rollout | None = None  # of the ACTOR stage, as if they had been sampled

    def evaluate(self) -> HeldOutReport:
        """Sample one completion a prompt, with the same random numbers each time, and judge it."""
        rows = rollout_rows(self.prompts.group_ids)
        rollout, rewards, read = self.scorer.read(self.engine.generate(self.prompts, self.seed, rows), rows)
        mask = rollout.response_mask
        texts, completions = rollout.prompts.texts, rollout.completions
        # Of all completions at once, and only once: what judges them may be slow, or count its calls.
        criteria = gather_results(lambda: _criteria(self.eval_fn, texts, completions) if is_main() else {})[0]
        return HeldOutReport(
            prompts=texts,
            completions=completions,
            rewards=rewards.tolist(),
            kl=kl_of_replies(read.logprobs, read.ref_logprobs, mask),
            length=float(rollout.lengths.float().mean()),
            finished=float(rollout.finished.float().mean()),
            distinct=len(set(completions)) / len(completions),
            criteria=criteria,
            kl_k1=float((k1(read.logprobs, read.ref_logprobs) * mask).sum(dim=1).mean()),
            reference_loss=-float(masked_mean(read.ref_logprobs, mask)),
            demonstration_loss=self._demonstration_loss(),
        )

    def _demonstration_loss(self) -> float | None:
        if self.demonstrations is None:
            return None
        read = self.scorer.likelihoods(self.demonstrations)
        return -float(masked_mean(read.logprobs, self.demonstrations.response_mask))


def _criteria(function: EvalFunction | None, prompts: list[str], completions: list[str]) -> dict[str, list[float]]:
    if function is None:
        return {}
    judged = _judged(call_function(function, EVAL_FN, prompts, completions))
    if len(judged) != len(completions):
        raise RewardError(
            f"{EVAL_FN} returned {len(judged)} results for {len(completions)} completions; return one each"
        )
    rows = [dict(row) if isinstance(row, Mapping) else {"score": row} for row in judged]
    for row, completion in zip(rows, completions, strict=True):
        for name in rows[0]:
            if name not in row:
                raise RewardError(f"{EVAL_FN}: a completion lacks the criterion {name!r}")
            if not _is_finite(row[name]):
                raise RewardError(
                    f"{EVAL_FN}: {name} is {row[name]!r} (completion {completion[:60]!r}); return a finite number"
                )
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def _judged(results: Any) -> list[Any]:
    try:
        return list(results)
    except TypeError:
        raise RewardError(f"{EVAL_FN}: expected a list of numbers or of criteria, got {results!r:.60}") from None


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
