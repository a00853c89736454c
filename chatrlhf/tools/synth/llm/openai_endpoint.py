"""Models behind an OpenAI-compatible endpoint: OpenAI's own, vLLM, llama.cpp, Ollama and many others.

The key comes from an environment variable and stands in no message, whatever the endpoint says.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

from chatrlhf.errors import GenerationError
from chatrlhf.errors.redaction import redacted
from chatrlhf.tools.synth.llm import NoAnswer, Reply, Request, TryAgain

OPENAI = "https://api.openai.com/v1"
LONGEST_WAIT = 300.0  # seconds; who is told to wait longer runs the command again then
PASSING = (408, 409, 425, 429)  # statuses of faults that may pass, beside those from 500
FOR_ALL = (401, 402, 403, 404, 405)  # of those that meet every request alike
# The models that ChatLLaMA named. Its completion models were no chat models, wherever somebody may have them still;
# the others OpenAI shut down on 23 October 2026, while other endpoints lend their name to models of their own.
NO_CHAT = re.compile(r"(text-|code-)?(davinci|curie|babbage|ada)(-[\w-]+)?")
SHUT_DOWN = re.compile(r"gpt-3\.5-turbo(-[\w-]+)?")
SHOWN_CHARS = 200


class Endpoint:
    """An endpoint's chat completions; see `TextGenerator`.

    Each request is sent once: tries, waits and limits are `tools/synth/client.py`'s, for whom every one counts.
    """

    def __init__(
        self, model: str, base_url: str | None = None, key_name: str = "OPENAI_API_KEY", timeout: float = 60.0
    ) -> None:
        """
        Args:
            model: as the endpoint calls it.
            base_url: up to ``/v1``; None for OpenAI's own.
            key_name: the environment variable that holds the key; an endpoint of one's own may do without.
            timeout: seconds for a whole request.

        Raises:
            GenerationError: openai is not installed, the address is none, the key is missing, or the model is gone.
        """
        refuse_gone(model, base_url)
        self.model, self.timeout, self._key_name = model, timeout, key_name
        self._openai, arguments = _client_arguments(base_url, key_name)
        # OpenAI's newer models know the limit by a name that other endpoints do not all have.
        self._limit = "max_completion_tokens" if base_url is None else "max_tokens"
        self._key = os.environ.get(key_name, "")
        # What is asked, and the key, are for the place that was named alone: no redirect is followed.
        http_client = self._openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout)
        self._client = self._openai.AsyncOpenAI(**arguments, timeout=timeout, http_client=http_client)

    async def reply(self, request: Request) -> Reply:
        openai = self._openai
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": each.role, "content": each.content} for each in request.messages],
            "temperature": request.temperature,
            self._limit: request.max_tokens,
        }
        try:
            # The library's own limit is one for each read: an endpoint could send a byte now and then for ever.
            response = await asyncio.wait_for(self._client.chat.completions.create(**asked), self.timeout)
        except (openai.APITimeoutError, asyncio.TimeoutError):
            raise TryAgain(f"no answer within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            raise TryAgain(self._shown(cause), unreachable=type(cause).__name__.startswith("Connect")) from None
        except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:  # broken JSON is a ValueError
            raise TryAgain(f"the answer cannot be read ({self._shown(error)})") from None
        return _read(response)

    async def close(self) -> None:
        await self._client.close()

    def _refused(self, error: Any) -> Exception:
        """What an error status means."""
        status = error.status_code
        if status == 401:  # its text may repeat a part of the key
            return GenerationError(f"the endpoint does not take the key in {self._key_name} (401); correct it")
        reason = f"{status}: {self._shown(error.message)}"
        if 300 <= status < 400:
            place = error.response.headers.get("location", "no address")
            return GenerationError(
                f"the endpoint redirects ({status}) to {self._shown(place)}; name that as --base-url if you trust it"
            )
        if status in FOR_ALL or error.code == "insufficient_quota":
            return GenerationError(f"the endpoint refuses model {self.model!r} ({reason}); correct --model, or pay")
        if status in PASSING or status >= 500:
            wait = _seconds(error.response.headers)
            if wait is not None and wait > LONGEST_WAIT:
                return GenerationError(
                    f"the endpoint asks to wait {wait:,.0f} s ({reason}); run the same command again then"
                )
            return TryAgain(reason, wait)
        return NoAnswer(f"the endpoint refuses this request ({reason})")

    def _shown(self, reason: object) -> str:
        """An endpoint's words in one short line, without the key."""
        text = " ".join(str(reason).split()) or type(reason).__name__
        text = text.replace(self._key, "[key]") if self._key else text
        text = redacted(text)
        return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 3] + "..."


def served_model(base_url: str, key_name: str = "OPENAI_API_KEY") -> str:
    """The model of an endpoint that has only one. Raises GenerationError where there is no such thing."""
    openai, arguments = _client_arguments(base_url, key_name)
    try:
        http_client = openai.DefaultHttpxClient(follow_redirects=False, timeout=20)
        with openai.OpenAI(**arguments, timeout=20, http_client=http_client) as client:
            names = [model.id for model in client.models.list().data or []]
    except (openai.OpenAIError, ValueError, TypeError, AttributeError) as error:
        raise GenerationError(
            f"{base_url} did not say which models it has ({type(error).__name__}); name one with --model"
        ) from None
    if len(names) != 1:
        listed = f"has {', '.join(map(str, names[:10]))}" if names else "lists no models"
        raise GenerationError(f"{base_url} {listed}; name one with --model")
    return names[0]


def refuse_gone(model: str, base_url: str | None = None) -> None:
    """Raises GenerationError for models that are no more, with what to use instead."""
    if NO_CHAT.fullmatch(model) or (base_url is None and SHUT_DOWN.fullmatch(model)):
        raise GenerationError(
            f"--model: {model!r} was shut down by OpenAI; use a chat model (its deprecations page names gpt-6-luna as "
            "the successor of the small ones), any model behind --base-url, or a local one such as google/flan-t5-xl"
        )


def _client_arguments(base_url: str | None, key_name: str) -> tuple[Any, dict[str, Any]]:
    try:
        import openai
    except ImportError:
        raise GenerationError('the openai package is missing; pip install "chatrlhf[openai]"') from None
    key = os.environ.get(key_name, "")
    if base_url is not None and not base_url.startswith(("http://", "https://")):
        raise GenerationError(f"--base-url: {base_url!r} is no address; give one such as http://localhost:8000/v1")
    if base_url is None and not key:
        raise GenerationError(
            f"OpenAI's endpoint needs a key in the environment variable {key_name}; set it, name another endpoint with "
            "--base-url, or a model on this machine with --model FOLDER"
        )
    return openai, {"api_key": key or "none", "base_url": base_url or OPENAI, "max_retries": 0}


def _read(response: Any) -> Reply:
    """A reply of what an endpoint sent, which may be anything."""
    choices = getattr(response, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    text = getattr(message, "content", None)
    if message is None or not isinstance(text, (str, type(None))):
        raise TryAgain("the answer holds no choices" if message is None else "the answer holds no text")
    finish, refusal = choices[0].finish_reason, getattr(message, "refusal", None)
    if finish == "content_filter" and not refusal:
        refusal = "the endpoint's content filter stopped it"
    usage = getattr(response, "usage", None)
    counts = [getattr(usage, f"{part}_tokens", None) for part in ("prompt", "completion")]
    prompt, completion = (count if isinstance(count, int) else None for count in counts)
    return Reply(text or "", prompt, completion, finish != "length", str(refusal) if refusal else None)


def _seconds(headers: Any) -> float | None:
    """How long Retry-After asks to wait: seconds, or the date until when (RFC 9110, section 10.2.3)."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time.time()
            except (TypeError, ValueError):
                continue
        if seconds == seconds:  # not NaN
            return max(seconds, 0.0)
    return None
