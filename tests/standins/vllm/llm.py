"""An engine in this process: a transformers model, sampled a row at a time."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm.sampling_params import SamplingParams


@dataclass
class Logprob:
    logprob: float
    rank: int


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    text: str
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """With `distributed_executor_backend="external_launcher"`, where the worker is reached as an attribute."""

    dtype = torch.bfloat16  # what vLLM makes of a float32 checkpoint
    started: list[LLM] = []  # for tests to look into

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        distributed_executor_backend: str | None = None,
        seed: int = 0,
        max_num_batched_tokens: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        quantization: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        config = AutoConfig.from_pretrained(model)
        if max_model_len is not None and max_model_len > config.max_position_embeddings:
            raise ValueError(f"max_model_len ({max_model_len}) is greater than the model's own")
        self.given = {k: v for k, v in locals().items() if k not in ("self", "config")}
        self.max_model_len = max_model_len or config.max_position_embeddings
        self.logprobs_mode = logprobs_mode
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=self.dtype).eval()
        self.tokenizer = None
        if (Path(model) / "tokenizer.json").exists():
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        eos = self.model.generation_config.eos_token_id
        self.eos_of_config = set(eos if isinstance(eos, list) else [eos]) - {None}
        self.weights = _Worker(self.model)
        runner = SimpleNamespace(model=self.weights)
        executor = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=executor)
        self.requests: list[SamplingParams] = []
        self.calls: list[str] = []
        self.asleep = {"weights": False, "kv_cache": False}
        self.generator = torch.Generator().manual_seed(seed)
        LLM.started.append(self)

    def generate(self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, use_tqdm: bool = True):
        assert not any(self.asleep.values()), "vLLM is asleep"
        self.calls.append("generate")
        self.requests.append(copy.deepcopy(sampling_params))
        return [self.one(row["prompt_token_ids"], copy.deepcopy(sampling_params)) for row in prompts]

    @torch.no_grad()
    def one(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        """One request, token by token."""
        if len(prompt) > self.max_model_len:
            raise ValueError(f"the prompt has {len(prompt)} tokens, the model takes {self.max_model_len}")
        tokenizer_eos = self.tokenizer.eos_token_id if self.tokenizer else None
        params.update_from_generation_config(self.eos_of_config, tokenizer_eos)
        generator = self.generator if params.seed is None else torch.Generator().manual_seed(params.seed)
        ids: list[int] = []
        logprobs: list[dict[int, Logprob]] = []
        reason = None
        while reason is None:
            raw = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
            logits = self.processed(raw, len(ids), params)
            token = int(torch.multinomial(logits.softmax(-1).nan_to_num(1.0), 1, generator=generator))
            source = logits if self.logprobs_mode == "processed_logprobs" else raw
            scores = source.log_softmax(-1)
            rank = int((scores > scores[token]).sum()) + 1
            ids.append(token)
            logprobs.append({token: Logprob(float(scores[token]), rank)})
            reason = self.reason_to_stop(prompt, ids, params)
        text = self.tokenizer.decode(ids, skip_special_tokens=True) if self.tokenizer else ""
        return RequestOutput(prompt, [CompletionOutput(ids, logprobs, text, reason)])

    def processed(self, logits: torch.Tensor, position: int, params: SamplingParams) -> torch.Tensor:
        """Bias, then EOS before the minimum, then temperature."""
        logits = logits.clone()
        for token, bias in (params.logit_bias or {}).items():
            logits[int(token)] += min(100.0, max(-100.0, bias))
        if position < params.min_tokens:
            logits[list(params.all_stop_token_ids)] = -torch.inf
        return logits / params.temperature

    def reason_to_stop(self, prompt: list[int], ids: list[int], params: SamplingParams) -> str | None:
        """Nothing ends a response before min_tokens."""
        if len(ids) < params.min_tokens:
            return None
        if ids[-1] == params.eos_token_id or ids[-1] in params.stop_token_ids:
            return "stop"
        if len(prompt) + len(ids) >= self.max_model_len or len(ids) >= params.max_tokens:
            return "length"
        if params.stop:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if any(stop in text for stop in params.stop):
                return "stop"
        return None

    def sleep(self, level: int = 1) -> None:
        assert self.given["enable_sleep_mode"], "sleep mode is not enabled"
        self.calls.append("sleep")
        self.asleep = {"weights": True, "kv_cache": True}
        if level == 2:
            with torch.no_grad():
                for weight in self.model.parameters():
                    weight.fill_(torch.nan)

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append("wake_up " + ",".join(tags))
        for tag in tags:
            self.asleep[tag] = False

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")


class _Worker:
    """Takes weights by the names of the checkpoint; an unknown one is an error."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.loaded = model, []

    @torch.no_grad()
    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        for name, weight in weights:
            if name not in own:
                raise KeyError(f"no weight {name!r}")
            assert own[name].shape == weight.shape, name
            own[name].copy_(weight)
            self.loaded.append(name)
