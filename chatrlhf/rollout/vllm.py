"""Rollouts sampled by vLLM, through `trl.generation`: in this process or by a server, always with current weights."""

from __future__ import annotations

import http.client
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.config.rl import VllmConfig
from chatrlhf.errors import ConfigError, DivergedError, RolloutError, UserError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.loading.lora import merged_parameters
from chatrlhf.models.stop_tokens import ids_in_generation_config
from chatrlhf.rollout.context import Limits
from chatrlhf.runtime.collectives import world_size
from chatrlhf.runtime.http_client import fetch
from chatrlhf.types import PromptBatch, Rollout

BACKEND, URL = "trainer_config.rollout_backend", "trainer_config.vllm.server_base_url"
# Limits of vLLM's SamplingParams and its sampler. A lower temperature would be raised. The bias is added to a logit:
# what it forbids keeps a probability of e^-100 or so.
TEMPERATURES, FORBIDDEN, FORBIDDING_BIAS = (0.01, 2.0), 1024, -100.0
HEALTH_SECONDS = 10.0  # how long one question for the server's health may stay without an answer
MOST_BYTES = 2**20  # of an answer to one


def require_vllm(temperature: float, forbidden: int) -> None:
    """Refuse what cannot be sampled, before anything long has started.

    Args:
        temperature: of the rollouts.
        forbidden: how many tokens are never to be sampled.

    Raises:
        ConfigError: vLLM is not installed, or does not sample like that.
    """
    from trl.import_utils import is_vllm_available

    if not is_vllm_available():
        raise ConfigError(
            f"{BACKEND}: 'vllm' needs a package that is not installed; pip install \"chatrlhf[vllm]\" in an "
            "environment with a GPU, or use 'chatrlhf'"
        )
    if not TEMPERATURES[0] <= temperature <= TEMPERATURES[1]:
        raise ConfigError(
            f"{BACKEND}: 'vllm' samples at temperatures from {TEMPERATURES[0]:g} to {TEMPERATURES[1]:g}, got "
            f"{temperature:g}; change trainer_config.gen_kwargs.temperature, or use 'chatrlhf'"
        )
    if forbidden > FORBIDDEN:
        raise ConfigError(
            f"{BACKEND}: 'vllm' forbids {FORBIDDEN} tokens at most, got {forbidden} (the pad token, ids of the model "
            "that no token has, and trainer_config.gen_kwargs.forbidden_tokens); name fewer there, or use 'chatrlhf'"
        )


@dataclass
class Response:
    """What one row said."""

    ids: list[int]  # EOS and the tokens of a stop string included
    logprobs: list[float]  # one a token
    finished: bool
    text: str  # without both


@dataclass
class VllmSampler:
    """Offers what `RolloutEngine` offers, over TRL's `VLLMGeneration`.

    vLLM draws from the same `SamplingDistribution`, but with kernels of its own: its log-probabilities differ a
    little from the trainer's, which is what `functional/importance.py` is for. Its random numbers are its own too, so
    equal seeds do not give equal responses.
    """

    policy: nn.Module
    tokenizer: Any
    distribution: SamplingDistribution
    limits: Limits
    decode: Callable[[list[int]], str]  # response ids without EOS to text
    settings: VllmConfig
    pad_token_id: int
    stop: list[str] = field(default_factory=list)
    chunk_size: int | None = None  # rows that vLLM decodes side by side, in this process
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        """Start vLLM in this process, or find its server.

        Raises:
            ConfigError: vLLM is not installed or does not start, no server answers or it serves something else, or
                vLLM cannot draw from this distribution.
        """
        require_vllm(self.distribution.temperature, len(self.distribution.forbidden_ids))
        self._forbidden = frozenset(self.distribution.forbidden_ids)
        self._refuse_what_cannot_be()
        self.served = self.settings.mode == "server"
        # The most tokens of prompt and response that a request may ask for. In this process vLLM ends a row at
        # max_model_len by itself; a server refuses the request.
        self.room = math.inf
        if self.served:
            wait_for_server(self.settings.server_base_url, self.settings.server_timeout)
            with self._one_line(ConfigError, "says not what it serves; start it with VLLM_SERVER_DEV_MODE=1"):
                self._check(server_settings(self.settings.server_base_url))
        with self._one_line(ConfigError, "did not start"):
            self.vllm = self._start()

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, seed: int, rows: Tensor | None = None) -> Rollout:
        """Give vLLM the policy's weights as they are now, and sample a response for each row.

        Args:
            prompts: B rows; rows of one group are sampled independently.
            seed: not used, see above.
            rows: [N] int64, the only ones to be answered.

        Raises:
            DivergedError: a log-probability is not finite.
            RolloutError: the server is gone, or what came back cannot have been drawn from the distribution.
        """
        if rows is not None:
            prompts = prompts.select(rows)
        lengths = prompts.attention_mask.sum(dim=1)
        max_new_tokens, min_new_tokens = self.limits.per_row(lengths)
        given = [ids[mask].tolist() for ids, mask in zip(prompts.input_ids, prompts.attention_mask, strict=True)]
        responses: dict[int, Response] = {}
        with self._one_line(RolloutError, "gave no rollout"):
            self.vllm.sync_weights()
            for asked, limit, least in self._requests(lengths, max_new_tokens, min_new_tokens):
                sampled = self._sample([given[row] for row in asked], limit, least)
                for row, (ids, logprobs) in zip(asked, sampled, strict=True):
                    responses[row] = self._response(ids, logprobs, int(max_new_tokens[row]), least)
        return self._rollout(prompts, min_new_tokens, [responses[row] for row in range(len(prompts))])

    def _requests(
        self, lengths: Tensor, max_new_tokens: Tensor, min_new_tokens: Tensor
    ) -> Iterator[tuple[list[int], int, int]]:
        """Rows that are sampled together, with the most and the fewest tokens that are asked for.

        A request has one pair of limits. Rows that may say less than the longest are cut behind it, which is exact:
        no token's distribution depends on where the response will be cut. But that of EOS depends on the fewest.
        """
        for least in min_new_tokens.unique().tolist():
            rows = (min_new_tokens == least).nonzero().squeeze(-1)
            rows = rows[max_new_tokens[rows].argsort(descending=True, stable=True)]
            while len(rows):
                limit = int(max_new_tokens[rows[0]])
                fits = lengths[rows] + limit <= self.room
                yield rows[fits].tolist(), limit, least
                rows = rows[~fits]

    def _sample(self, prompts: list[list[int]], limit: int, least: int) -> list[tuple[list[int], list[float]]]:
        """One request: ids and log-probabilities of a response each."""
        self.vllm.max_completion_length = limit
        self.vllm.generation_kwargs = {
            # The model's own EOS may be another than those that end a response here.
            "ignore_eos": True,
            "stop_token_ids": list(self.distribution.eos_token_ids),
            "min_tokens": least,
            "logit_bias": {token: FORBIDDING_BIAS for token in self.distribution.forbidden_ids},
            "stop": self.stop,
            # No seed: all rows of a request would draw with the same numbers, and samples of one prompt be equal.
        }
        echo, ids, logprobs, scored = self.vllm.generate(prompts=prompts, images=None, num_generations=1)
        ids = [list(row) for row in ids]
        of = [[token[0] for token in row] for row in scored or []]
        if [list(row) for row in echo] != prompts or of != ids or not all(ids):
            raise RolloutError(
                f"{BACKEND}: vLLM answered for other prompts, or gave log-probabilities of other tokens than it "
                "sampled; use versions of vllm and trl that go together"
            )
        # TRL turns NaN into None.
        plain = [[math.nan if token[0] is None else token[0] for token in row] for row in logprobs]
        broken = sum(not all(map(math.isfinite, row)) for row in plain)
        if broken:
            raise DivergedError(
                f"the policy's logits are not finite any more ({broken} of {len(plain)} rollouts by vLLM); go back to "
                "an earlier checkpoint with a lower trainer_config.actor_lr"
            )
        return list(zip(ids, plain, strict=True))

    def _response(self, ids: list[int], logprobs: list[float], max_new_tokens: int, least: int) -> Response:
        """One row, ended where the engine would have ended it."""
        ids, logprobs = ids[:max_new_tokens], logprobs[:max_new_tokens]
        ends = [at for at, token in enumerate(ids) if token in self.distribution.eos_token_ids]
        forbidden = self._forbidden.intersection(ids)
        if forbidden or ends and not least <= ends[0] == len(ids) - 1:
            raise RolloutError(
                f"{BACKEND}: vLLM sampled what trainer_config.gen_kwargs forbids (tokens {sorted(forbidden)}, or EOS "
                f"before {least} tokens, or tokens behind EOS): {ids[:20]}; use versions of vllm and trl that go "
                "together"
            )
        said = ids[:-1] if ends else ids
        for end in range(1, len(said) + 1) if self.stop else ():
            text = self.decode(said[:end])
            found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
            if found:
                return Response(ids[:end], logprobs[:end], True, text[: min(found)])
        # vLLM looks for stop strings in a text that it decodes itself, and may see one where `decode` has none.
        stopped = bool(self.stop) and len(ids) < max_new_tokens
        return Response(ids, logprobs, bool(ends) or stopped, self.decode(said))

    def _rollout(self, prompts: PromptBatch, min_new_tokens: Tensor, responses: list[Response]) -> Rollout:
        lengths = torch.tensor([len(each.ids) for each in responses])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.pad_token_id, dtype=torch.long)
        logprobs = torch.zeros(mask.shape)
        ids[mask] = torch.tensor([token for each in responses for token in each.ids])
        logprobs[mask] = torch.tensor([value for each in responses for value in each.logprobs])
        finished = torch.tensor([each.finished for each in responses])
        return Rollout(prompts, ids, mask, logprobs, finished, min_new_tokens, [each.text for each in responses])

    def _start(self) -> Any:
        from accelerate import Accelerator
        from trl.generation.vllm_generation import VLLMGeneration

        settings = self.settings
        return VLLMGeneration(
            model=_Weights(self.policy),
            accelerator=Accelerator(),
            processing_class=self.tokenizer,
            mode=settings.mode,
            server_base_url=settings.server_base_url,
            server_timeout=settings.server_timeout,
            group_port=settings.group_port,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            max_model_length=self.limits.max_length,
            max_num_seqs=self.chunk_size,
            enable_sleep_mode=settings.enable_sleep_mode,
            trust_remote_code=self.trust_remote_code,
            # The whole distribution, whatever TRL's defaults are.
            temperature=self.distribution.temperature,
            repetition_penalty=1.0,
            top_p=1.0,
            top_k=0,
            min_p=0.0,
            logprobs=0,  # of the sampled token alone
        )

    def _refuse_what_cannot_be(self) -> None:
        """What is known before vLLM is started."""
        if world_size() > 1:
            raise ConfigError(f"{BACKEND}: 'vllm' samples for one process, got {world_size()}; use 'chatrlhf'")
        if not self.policy.name_or_path:
            raise ConfigError(
                f"{BACKEND}: vLLM reads the model's files, and this policy was created on the fly; run --type ACTOR "
                "first, or name a model in actor_config.model"
            )
        if not (self.limits.min_new_tokens or self.limits.min_length):
            return
        others = {self.tokenizer.eos_token_id, *ids_in_generation_config(self.policy)} - {
            *self.distribution.eos_token_ids
        }
        if others:
            raise ConfigError(
                f"{BACKEND}: vLLM forbids all tokens that end the model's texts before min_new_tokens, also "
                f"{sorted(others)}, which end no response here; add them to trainer_config.gen_kwargs.eos_token_id, or "
                "set min_new_tokens (actor_config.min_tokens) and min_length to 0"
            )

    def _check(self, serves: dict[str, Any]) -> None:
        """The server's log-probabilities and room are the ones that are needed."""
        self.room = serves["max_model_len"]
        if serves["logprobs_mode"] != "processed_logprobs":
            raise ConfigError(
                f"{URL}: the server gives {serves['logprobs_mode']}, expected those of the distribution that is "
                "sampled; start it with --logprobs-mode processed_logprobs"
            )
        if self.room < self.limits.max_length:
            raise ConfigError(
                f"{URL}: the server takes {self.room} tokens, expected {self.limits.max_length}; start it with "
                f"--max-model-len {self.limits.max_length}, or lower trainer_config.gen_kwargs.max_length"
            )

    @contextmanager
    def _one_line(self, kind: type[UserError], failed: str) -> Iterator[None]:
        """Errors of vLLM and TRL as one line that names the key."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # TRL raises no narrower one for an answer other than 200
            if kind is RolloutError and not self.served:
                raise  # an error in this process, with its traceback
            who = f"{URL}: the server at {self.settings.server_base_url}" if self.served else f"{BACKEND}: vLLM"
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise kind(f"{who} {failed} ({reason})") from error


class _Weights(nn.Module):
    """A policy as TRL's weight sync reads one: names as in its checkpoint, adapters merged, one weight at a time."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.name_or_path = policy.name_or_path
        self._policy = (policy,)  # not a submodule, whose names would be others

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, Tensor]]:
        return merged_parameters(self._policy[0])


def server_settings(url: str) -> dict[str, Any]:
    """vLLM's `ModelConfig` as a server reports it; an OSError or KeyError where it does not."""
    answer = fetch(f"{url}/server_info?config_format=json", MOST_BYTES, HEALTH_SECONDS)
    return json.loads(answer)["vllm_config"]["model_config"]


def wait_for_server(url: str, seconds: float) -> None:
    """Return once a vLLM server says that it is well.

    TRL's own waiting has no end where something else answers at that address.

    Raises:
        ConfigError: it did not, within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            fetch(f"{url}/health", MOST_BYTES, min(HEALTH_SECONDS, seconds))
            return
        except (OSError, http.client.HTTPException) as error:  # no one there, an error status, no answer, no HTTP
            reason = error
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{URL}: no vLLM server answers at {url} within {seconds:g} s ({reason}); start `vllm serve`, correct "
                "the address, or give it more time with trainer_config.vllm.server_timeout"
            )
        time.sleep(min(1.0, seconds / 4))
