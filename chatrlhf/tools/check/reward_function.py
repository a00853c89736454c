"""Checks of a reward function or endpoint: it answers, and a reply's score is its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from chatrlhf.conversation import Prompt
from chatrlhf.rl.rewards import resolve_reward_fn
from chatrlhf.runtime.check_result import CheckResult, judged
from chatrlhf.stages.data_checks import few_prompts
from chatrlhf.tools.check.session import Session

REPLIES = ("Yes, gladly.", "I do not know; please ask somebody else about it.")
Scores = Callable[[list[Any], list[str]], torch.Tensor]  # prompts and completions to scores [B]


def check_reward_function(session: Session) -> Iterator[CheckResult]:
    """The function or endpoint that the configuration names answers for two rows."""
    name = session.config.reward_config.reward_fn
    if name is None or "RL" not in session.stages:
        return
    texts = [prompt.text for prompt in few_prompts(session.inputs)] or ["Hello"]
    seconds = session.config.reward_config.reward_timeout
    yield from answers(resolve_reward_fn(name, seconds).texts, [texts[0], texts[-1]])


def answers(scores: Scores, prompts: list[str]) -> Iterator[CheckResult]:
    """Two rows are scored at once, and the first of them alone. Raises RewardError."""
    began = time.perf_counter()
    both = scores(list(prompts), list(REPLIES))
    measured = f"two rows were scored in {time.perf_counter() - began:.2f} s: {both[0]:.4g}, {both[1]:.4g}"
    yield CheckResult("reward function answers", "pass", measured)
    alone = scores(prompts[:1], list(REPLIES[:1]))
    yield judged(
        "reward function alone",
        f"the first row's score is {both[0]:.6g} beside another row and {alone[0]:.6g} alone",
        "let a score depend on its own row alone, without chance, or PPO learns from noise",
        warn=not torch.allclose(both[:1], alone, rtol=1e-4, atol=1e-5),
    )


def check_padding(name: str, scores: Scores, rows: list[tuple[Prompt, str]]) -> CheckResult:
    """A row's score does not depend on longer rows beside it, which pad it.

    Args:
        rows: prompts and replies of several lengths, at least two.
    """
    prompts, replies = [prompt for prompt, _ in rows], [reply for _, reply in rows]
    together = scores(prompts, replies)
    alone = torch.cat([scores([prompt], [reply]) for prompt, reply in rows])
    difference = float((together - alone).abs().max())
    tolerance = 1e-3 * max(float(together.std(correction=0)), 1.0)
    return judged(
        name,
        f"{len(rows)} rows differ by at most {difference:.1e} between a padded batch and alone",
        "name another reward model: its scores depend on which rows share a batch",
        fail=not difference <= tolerance,
    )
