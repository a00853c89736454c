"""The parameters of a request, checked as vLLM checks them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class StructuredOutputsParams:
    regex: str | None = None


@dataclass(kw_only=True)
class SamplingParams:
    """The fields that this package or TRL may set; an unknown one is a TypeError, as in vLLM."""

    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    all_stop_token_ids: set[int] = field(default_factory=set, init=False)
    eos_token_id: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        self.temperature = max(self.temperature, 0.01) if self.temperature > 0 else self.temperature
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2], got {self.temperature}.")
        if self.max_tokens is not None and not self.min_tokens <= self.max_tokens >= 1:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}.")
        if len(self.logit_bias or {}) > 1024:
            raise ValueError(f"Too many logit bias tokens: {len(self.logit_bias)}.")
        if any(not text for text in self.stop):
            raise ValueError("stop cannot contain an empty string.")
        self.all_stop_token_ids.update(self.stop_token_ids)

    def update_from_generation_config(self, eos_of_config: set[int], eos_token_id: int | None) -> None:
        """What the engine adds: EOS of tokenizer and generation config, forbidden before min_tokens in any case."""
        ends = eos_of_config | ({eos_token_id} - {None})
        self.all_stop_token_ids.update(ends)
        if not self.ignore_eos:
            self.eos_token_id = eos_token_id
            self.stop_token_ids = list(dict.fromkeys([*self.stop_token_ids, *ends]))
