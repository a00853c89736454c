"""The rollout engine: prompts in, sampled responses out, over any causal transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from chatrlhf.functional.logprobs import SamplingDistribution, sample_by_inversion, selected_logprobs
from chatrlhf.types import PromptBatch, Rollout


@dataclass
class Limits:
    """How long a response may and must be. Lengths count tokens; both kinds of bound may be given."""

    max_new_tokens: int
    max_length: int  # prompt and response together: the context, or less
    min_new_tokens: int = 0
    min_length: int = 0  # prompt and response together

    def per_row(self, prompt_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(most, fewest) response tokens of each row, both [B] int64.

        Raises:
            ValueError: a prompt leaves no room for a token; callers drop such prompts beforehand.
        """
        most = (self.max_length - prompt_lengths).clamp(max=self.max_new_tokens)
        if bool((most < 1).any()):
            raise ValueError(f"a prompt of {int(prompt_lengths.max())} tokens leaves no room in {self.max_length}")
        fewest = (self.min_length - prompt_lengths).clamp(min=self.min_new_tokens)
        return most, torch.minimum(fewest, most)


@dataclass
class RolloutEngine:
    """Samples one response a prompt row, token by token.

    Every row draws with its own stream of uniform numbers, made from the seed and the row's place in the
    rollout batch. So what a row says does not depend on the chunk it is decoded in.
    """

    model: nn.Module
    distribution: SamplingDistribution
    limits: Limits
    pad_token_id: int
    decode: Callable[[list[int]], str]  # response ids without EOS to text
    stop: list[str] = field(default_factory=list)
    chunk_size: int | None = None
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        # Some families (BLOOM) derive positions from the mask and take none; a few compute all logits.
        self.takes_positions = "position_ids" in parameters
        self.keep_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, seed: int) -> Rollout:
        """Sample a response for each row.

        Args:
            prompts: B rows; rows of one group are sampled independently.
            seed: equal seeds give equal responses.
        """
        device = next(self.model.parameters()).device
        most, fewest = self.limits.per_row(prompts.attention_mask.sum(dim=1))
        width = int(most.max())
        uniforms = torch.rand(len(prompts), width, generator=torch.Generator().manual_seed(seed))
        ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.long)
        logprobs = torch.zeros(len(prompts), width)
        lengths = torch.zeros(len(prompts), dtype=torch.long)
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        texts: list[str] = [""] * len(prompts)
        for rows in torch.arange(len(prompts)).split(self.chunk_size or len(prompts)):
            chunk = _Chunk(self, prompts.select(rows), most[rows], fewest[rows], uniforms[rows], device)
            chunk.run()
            ids[rows], logprobs[rows] = chunk.ids.cpu(), chunk.logprobs.cpu()
            lengths[rows], finished[rows] = chunk.lengths.cpu(), chunk.finished.cpu()
            for i, text in zip(rows.tolist(), chunk.texts(), strict=True):
                texts[i] = text
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return Rollout(prompts, ids[:, :longest], mask, logprobs[:, :longest], finished, fewest, texts)


class _Chunk:
    """Rows that are decoded side by side. ``alive`` maps the rows of the batch in flight to the chunk's rows."""

    def __init__(
        self, engine: RolloutEngine, prompts: PromptBatch, most: Tensor, fewest: Tensor, uniforms: Tensor, device: Any
    ) -> None:
        self.engine, self.device = engine, device
        self.prompt_ids = prompts.input_ids.to(device)
        self.prompt_mask = prompts.attention_mask.to(device)
        self.most, self.fewest, self.uniforms = most.to(device), fewest.to(device), uniforms.to(device)
        size, width = uniforms.shape
        self.ids = torch.full((size, width), engine.pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(size, width, device=device)
        self.lengths = torch.zeros(size, dtype=torch.long, device=device)
        self.finished = torch.zeros(size, dtype=torch.bool, device=device)
        self.stopped_text: dict[int, str] = {}
        self.eos = torch.tensor(engine.distribution.eos_token_ids, dtype=torch.long, device=device)

    def run(self) -> None:
        """Prefill the prompts, then draw one token a row and step until every row has ended."""
        alive = torch.arange(len(self.ids), device=self.device)
        mask = self.prompt_mask
        cache = DynamicCache(config=self.engine.model.config)
        logits = self._forward(self.prompt_ids, mask, cache)
        step = 0
        while True:
            logits = self.engine.distribution.adjust(logits, torch.full_like(alive, step), self.fewest[alive])
            tokens = sample_by_inversion(logits, self.uniforms[alive, step])
            self.ids[alive, step] = tokens
            self.logprobs[alive, step] = selected_logprobs(logits, tokens)
            self.lengths[alive] += 1
            self.finished[alive] = torch.isin(tokens, self.eos)
            if self.engine.stop:
                self._check_stop(alive, step)
            step += 1
            keep = (~self.finished[alive] & (step < self.most[alive])).nonzero().squeeze(-1)
            if len(keep) == 0:
                return
            if len(keep) < len(alive):  # rows that have ended leave the batch
                cache.batch_select_indices(keep)
                alive, mask, tokens = alive[keep], mask[keep], tokens[keep]
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)

    def texts(self) -> list[str]:
        """The response texts, without EOS and stop string."""
        texts = []
        for row, length in enumerate(self.lengths.tolist()):
            ids = self.ids[row, :length]
            if row not in self.stopped_text and bool(torch.isin(ids[-1], self.eos)):
                ids = ids[:-1]
            texts.append(self.stopped_text.get(row, self.engine.decode(ids.tolist())))
        return texts

    def _check_stop(self, alive: Tensor, step: int) -> None:
        """End rows whose text now holds a stop string; the text is cut in front of it, the tokens stay."""
        for row in alive[~self.finished[alive]].tolist():
            text = self.engine.decode(self.ids[row, : step + 1].tolist())
            found = [at for stop in self.engine.stop if (at := text.find(stop)) >= 0]
            if found:
                self.finished[row] = True
                self.stopped_text[row] = text[: min(found)]

    def _forward(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits of each row, [rows, V]."""
        kwargs = dict(self.engine.keep_last)
        if self.engine.takes_positions:
            kwargs["position_ids"] = (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with self.engine.autocast():
            output = self.engine.model(
                input_ids=ids,
                attention_mask=mask.long(),
                past_key_values=cache,
                use_cache=True,
                **kwargs,
            )
        return output.logits[:, -1]
