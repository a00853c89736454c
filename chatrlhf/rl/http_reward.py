"""Reward endpoint: prompts and completions are posted as JSON, scores come back."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
from collections.abc import Callable, Sequence

from chatrlhf.errors import RewardError
from chatrlhf.runtime.http_client import ReplyError, fetch

USUAL_SECONDS = 300.0  # reward_config.reward_timeout's default
# The most that is read of an answer: what a score takes, however it is written, and what else may stand beside them.
BYTES_BESIDE, BYTES_A_SCORE = 2**20, 2**12
SHOWN_CHARS = 80
PAUSES = (1.0, 4.0)  # seconds before a second and a third try
PASSES = (408, 425, 429)  # statuses below 500 that ask for another try


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
            answer = json.loads(_answered(url, most_bytes, seconds or USUAL_SECONDS, body))
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


def _answered(url: str, most_bytes: int, seconds: float, body: bytes) -> bytes:
    """An endpoint's answer, asked for again where it may have been away for a moment; all tries share the time."""
    deadline, left = time.monotonic() + seconds, seconds
    for pause in PAUSES:
        try:
            return fetch(url, most_bytes, left, body)
        except (OSError, http.client.HTTPException) as error:
            if not _passes(error) or time.monotonic() + pause >= deadline:
                raise
        time.sleep(pause)
        left = deadline - time.monotonic()
    return fetch(url, most_bytes, left, body)


def _passes(error: Exception) -> bool:
    """Whether an error may be gone at the next try: no connection, or a server that says that it is busy."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in PASSES
    return not isinstance(error, ReplyError)
