"""Reward endpoint: prompts and completions are posted as JSON, scores come back."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Sequence

from chatrlhf.errors import RewardError
from chatrlhf.runtime.http_client import fetch

USUAL_SECONDS = 300.0  # reward_config.reward_timeout's default
# The most that is read of an answer: what a score takes, however it is written, and what else may stand beside them.
BYTES_BESIDE, BYTES_A_SCORE = 2**20, 2**12
SHOWN_CHARS = 80


def http_reward(url: str, seconds: float | None = None) -> Callable[[list[str], list[str]], Sequence[float]]:
    """A reward function that posts ``{"prompts": [...], "completions": [...]}`` and reads ``{"scores": [...]}``.

    User and password in the URL are sent as basic authentication; errors hide them.

    Args:
        seconds: that an answer may take.
    """

    def post(prompts: list[str], completions: list[str]) -> Sequence[float]:
        body = json.dumps({"prompts": prompts, "completions": completions}).encode()
        most_bytes = BYTES_BESIDE + BYTES_A_SCORE * len(completions)
        try:
            answer = json.loads(fetch(url, most_bytes, seconds or USUAL_SECONDS, body))
        # OSError: no connection, an error status, a redirect elsewhere, a timeout; ValueError: not JSON, or not even
        # text; RecursionError: lists within lists within lists.
        except (OSError, http.client.HTTPException, ValueError, RecursionError) as error:
            raise RewardError(f"reward_config.reward_fn: {url} gave no scores ({error})") from None
        scores = answer.get("scores") if isinstance(answer, dict) else answer
        if not isinstance(scores, list):
            raise RewardError(
                f"reward_config.reward_fn: {url} answered without a list of scores: {str(answer)[:SHOWN_CHARS]!r}"
            )
        return scores

    return post
