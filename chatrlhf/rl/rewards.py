"""Where scores come from: a trained model, a Python function or an HTTP endpoint, behind one call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from chatrlhf.data.encoder import Encoder
from chatrlhf.errors import NonFiniteRewardError, RewardError
from chatrlhf.errors.redaction import redacted
from chatrlhf.models.loading.tokenizer import same_tokenizer
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.rl.http_reward import http_reward
from chatrlhf.rl.user_functions import call_function, check_signature, load_function
from chatrlhf.types import Rollout

TRIED_PROMPTS, TRIED_REPLIES = ("Is it far?", "What does it cost?"), ("Yes, it is far.", "No.")
RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class RewardSource(Protocol):
    """Gives one finite number a response, [B] float32 on the CPU."""

    def __call__(self, rollout: Rollout) -> Tensor: ...


@dataclass
class FunctionReward:
    """A Python function ``(prompts, completions) -> scores``; prompts are texts, untemplated.

    Args:
        seconds: that it may take for a batch; None: any time.

    Raises:
        ConfigError: it is no function, or takes other arguments.
    """

    function: RewardFunction
    name: str
    seconds: float | None = None

    def __post_init__(self) -> None:
        check_signature(self.function, f"the reward function {self.name}")

    def __call__(self, rollout: Rollout) -> Tensor:
        return self.texts(rollout.prompts.texts, rollout.completions)

    def texts(self, prompts: list[Any], completions: list[str]) -> Tensor:
        """Scores of texts. Raises RewardError where they are not one finite number each, or the function raises."""
        scores = call_function(self.function, f"the reward function {self.name}", prompts, completions, self.seconds)
        return checked_scores(scores, completions, self.name)

    def try_out(self, prompts: list[str]) -> None:
        """Ask for the scores of two replies, before models are read: what it gives or raises is seen at once.

        Args:
            prompts: the first two of them are taken, where there are any.

        Raises:
            RewardError: as `texts`, said of the trial.
        """
        pairs = list(zip([*prompts, *TRIED_PROMPTS], TRIED_REPLIES, strict=False))
        shown, replies = [prompt for prompt, _ in pairs], [reply for _, reply in pairs]
        name = f"the reward function {self.name}"
        then = "it was tried with two replies before anything is trained, correct it and start again"
        scores = call_function(self.function, name, shown, replies, self.seconds, then)
        checked_scores(scores, replies, f"{name}, tried with two replies before anything is trained")


@dataclass
class DialogueReward(FunctionReward):
    """A function of whole prompts, turns and all, which renders them itself."""

    def __call__(self, rollout: Rollout) -> Tensor:
        prompts = [prompt.text if prompt.is_text else prompt for prompt in rollout.prompts.prompts]
        return self.texts(prompts, rollout.completions)


@dataclass
class ModelReward:
    """A trained reward model.

    Where its tokenizer and template are the policy's, and that reads prompt and response as one row, it scores the very
    ids that were sampled; otherwise it re-encodes prompt and completion in its own way. A response that was cut by
    length ends without EOS, and one that a stop string ended is scored by its text, which no longer holds the string.
    """

    scorer: RewardScorer
    policy_encoder: Encoder

    def __post_init__(self) -> None:
        self.same_ids = (
            same_tokenizer(self.scorer.tokenizer, self.policy_encoder.tokenizer)
            and self.scorer.encoder.chat_template == self.policy_encoder.chat_template
            and type(self.scorer.encoder) is type(self.policy_encoder) is Encoder
        )

    def __call__(self, rollout: Rollout) -> Tensor:
        eos = self.scorer.tokenizer.eos_token_id
        rows = []
        for i, length in enumerate(rollout.lengths.tolist()):
            response = rollout.response_ids[i, :length].tolist()
            finished = bool(rollout.finished[i])
            if self.same_ids and finished == (response[-1] == eos):
                prompt = rollout.prompts.input_ids[i][rollout.prompts.attention_mask[i]].tolist()
                rows.append((prompt + response)[-self.scorer.encoder.max_length :])
            else:
                rows.append(self.scorer.encode(rollout.prompts.prompts[i], rollout.completions[i], finished))
        return checked_scores(self.scorer.score_ids(rows), rollout.completions, "the reward model")


def is_url(name: str) -> bool:
    """Whether `reward_config.reward_fn` names an endpoint."""
    return name.startswith(("http://", "https://"))


def resolve_reward_fn(name: str, seconds: float | None = None) -> FunctionReward:
    """`reward_config.reward_fn` as a reward source that may take so many seconds for a batch."""
    if is_url(name):
        return FunctionReward(http_reward(name, seconds), redacted(name), seconds)
    return FunctionReward(load_function(name, "reward_config.reward_fn"), name, seconds)


def _number(score: Any) -> float:
    if isinstance(score, (str, bytes, Tensor)) and not (isinstance(score, Tensor) and score.numel() == 1):
        raise TypeError  # float() would take "1.5", and "12" would be two scores
    return float(score)


def _listed(scores: Any) -> Any:
    """What can be gone through in the order of the rows. Raises TypeError."""
    if isinstance(scores, (str, bytes, bytearray, Mapping, Set)):
        raise TypeError
    if isinstance(scores, Tensor):
        if scores.is_complex():
            raise TypeError
        return scores.detach().float().cpu().reshape(-1).tolist()
    return scores.reshape(-1).tolist() if isinstance(scores, np.ndarray) else scores


def _shown(scores: Any) -> str:
    try:
        return f"{type(scores).__name__} {str(scores)[:60]}"
    except Exception:  # a class of the user's that has no text
        return type(scores).__name__


def checked_scores(scores: Any, completions: list[str], name: str) -> Tensor:
    """Scores as float32 [B], after checking that there is one finite number a completion.

    Raises:
        RewardError: it names the first completion whose score is missing or is no number; a NonFiniteRewardError
            where each is one.
    """
    try:
        values = [_number(score) for score in _listed(scores)]
    except Exception:  # whatever classes of the user's raise
        if inspect.iscoroutine(scores):
            scores.close()  # or Python would complain that it was never awaited
        raise RewardError(f"{name}: expected a list of numbers, got {_shown(scores)}") from None
    if len(values) != len(completions):
        raise RewardError(f"{name}: returned {len(values)} scores for {len(completions)} completions; return one each")
    checked = torch.tensor(values, dtype=torch.float32)  # a number beyond float32 is inf here
    for i, is_finite in enumerate(checked.isfinite().tolist()):
        if not is_finite:
            raise NonFiniteRewardError(
                f"{name}: score {i} is {values[i]} (completion {completions[i][:60]!r}); return a finite number"
            )
    return checked
