"""The rollout engine: prompts in, sampled responses out, over any causal transformers model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from chatrlhf.errors import DivergedError
from chatrlhf.functional.logprobs import SamplingDistribution, sample_by_inversion
from chatrlhf.generation.cache import make_cache, width_for
from chatrlhf.types import PromptBatch, Rollout

# Rows that have ended leave the batch when this share of it has: moving the others' keys and values costs something.
LEAVE_AT = 1 / 8


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
    rollout batch. So what a row says does not depend on the chunk it is decoded in, up to rounding: products of other
    shapes round otherwise, in bfloat16 often enough to change a token (`benchmarks/bf16_flips.py` counts them).
    """

    model: nn.Module
    distribution: SamplingDistribution
    limits: Limits
    pad_token_id: int
    decode: Callable[[list[int]], str]  # response ids without EOS to text
    stop: list[str] = field(default_factory=list)
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        # Some families (BLOOM) derive positions from the mask and take none; a few compute all logits.
        self.takes_positions = "position_ids" in parameters
        self.keep_last = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    @torch.no_grad()
    def generate(self, prompts: PromptBatch, seed: int, rows: Tensor | None = None) -> Rollout:
        """Sample a response for each row.

        Args:
            prompts: B rows; rows of one group are sampled independently.
            seed: equal seeds give equal responses.
            rows: [N] int64, the only ones to be answered; they say what they would among all.

        Raises:
            DivergedError: the model's logits are not finite.
        """
        device = next(self.model.parameters()).device
        most, fewest = self.limits.per_row(prompts.attention_mask.sum(dim=1))
        width = int(most.max())
        uniforms = torch.rand(len(prompts), width, generator=torch.Generator().manual_seed(seed))
        if rows is not None:
            prompts, most, fewest, uniforms = prompts.select(rows), most[rows], fewest[rows], uniforms[rows]
        ids = torch.full((len(prompts), width), self.pad_token_id, dtype=torch.long)
        logprobs = torch.zeros(len(prompts), width)
        lengths = torch.zeros(len(prompts), dtype=torch.long)
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        texts: list[str] = [""] * len(prompts)
        # Prompts of one length side by side need little padding; samples of one prompt stay together.
        by_length = torch.argsort(prompts.attention_mask.sum(dim=1), stable=True)
        for rows in by_length.split(self.chunk_size or len(prompts)):
            chunk = _Chunk(self, prompts.select(rows), most[rows], fewest[rows], uniforms[rows], device)
            chunk.run()
            broken = int((~chunk.logprobs.isfinite()).any(dim=1).sum())
            if broken:
                raise DivergedError(
                    f"the policy's logits are not finite any more ({broken} of {len(rows)} rollouts); go back to an "
                    "earlier checkpoint with a lower trainer_config.actor_lr"
                )
            width = chunk.ids.shape[1]
            ids[rows, :width], logprobs[rows, :width] = chunk.ids.cpu(), chunk.logprobs.cpu()
            lengths[rows], finished[rows] = chunk.lengths.cpu(), chunk.finished.cpu()
            for i, text in zip(rows.tolist(), chunk.texts(), strict=True):
                texts[i] = text
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        return Rollout(prompts, ids[:, :longest], mask, logprobs[:, :longest], finished, fewest, texts)


class _Chunk:
    """Rows that are decoded side by side, at most one token a step.

    ``flight`` maps the rows of the batch in flight to the chunk's rows; ``live`` says which of them have not ended.
    """

    def __init__(
        self, engine: RolloutEngine, prompts: PromptBatch, most: Tensor, fewest: Tensor, uniforms: Tensor, device: Any
    ) -> None:
        self.engine, self.device = engine, device
        used = prompts.attention_mask.any(dim=0)
        self.prompt_ids = prompts.input_ids[:, used].to(device)
        self.prompt_mask = prompts.attention_mask[:, used].to(device)
        self.group_ids = prompts.group_ids.to(device)
        width = int(most.max())
        self.most, self.fewest, self.uniforms = most.to(device), fewest.to(device), uniforms[:, :width].to(device)
        self.ids = torch.full((len(most), width), engine.pad_token_id, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(len(most), width, device=device)
        self.lengths = torch.zeros(len(most), dtype=torch.long, device=device)
        self.finished = torch.zeros(len(most), dtype=torch.bool, device=device)
        self.stopped_text: dict[int, str] = {}
        self.eos = torch.tensor(engine.distribution.eos_token_ids, dtype=torch.long, device=device)

    def run(self) -> None:
        """Prefill the prompts, then draw one token a row and step until every row has ended."""
        flight = torch.arange(len(self.ids), device=self.device)
        live = torch.ones_like(flight, dtype=torch.bool)
        # Room for all that may come, hidden until it is written.
        filled = self.prompt_mask.shape[1]
        mask = torch.nn.functional.pad(self.prompt_mask, (0, width_for(filled + self.ids.shape[1]) - filled))
        prompt_lengths = self.prompt_mask.sum(dim=1)
        logits, cache = self._prefill()
        for step in range(self.ids.shape[1]):
            logits = self.engine.distribution.adjust(logits, torch.full_like(flight, step), self.fewest[flight])
            tokens, logprobs = sample_by_inversion(logits, self.uniforms[flight, step])
            rows = flight[live]
            self.ids[rows, step], self.logprobs[rows, step] = tokens[live], logprobs[live]
            self.lengths[rows] = step + 1
            self.finished[rows] = torch.isin(tokens[live], self.eos)
            if self.engine.stop:
                self._check_stop(rows, step)
            live = ~self.finished[flight] & (step + 1 < self.most[flight])
            left = int(live.sum())
            if left == 0:
                return
            if len(flight) - left >= LEAVE_AT * len(flight):
                keep = live.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                flight, mask, tokens, live = flight[keep], mask[keep], tokens[keep], live[keep]
            mask[:, filled] = True
            filled += 1
            # A row that has ended and is still in flight must not outrun a table of positions.
            positions = (prompt_lengths[flight, None] + step).clamp(max=self.engine.limits.max_length - 1)
            logits = self._forward(tokens[:, None], mask[:, : width_for(filled)], positions, cache)

    def _prefill(self) -> tuple[Tensor, DynamicCache]:
        """Next-token logits and cache of every row; samples of one prompt share its forward."""
        groups, of_row = torch.unique(self.group_ids, return_inverse=True)
        rows = torch.arange(len(of_row), device=self.device)
        first = torch.full_like(groups, len(rows)).scatter_reduce(0, of_row, rows, "amin")
        mask = self.prompt_mask[first]
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        cache = make_cache(self.engine.model.config)
        logits = self._forward(self.prompt_ids[first], mask, positions, cache)
        # Groups come in the order of their ids, which need not be that of the rows.
        cache.batch_select_indices(of_row)
        return logits[of_row], cache

    def texts(self) -> list[str]:
        """The response texts, without EOS and stop string."""
        texts = []
        for row, length in enumerate(self.lengths.tolist()):
            ids = self.ids[row, :length]
            if row not in self.stopped_text and bool(torch.isin(ids[-1], self.eos)):
                ids = ids[:-1]
            texts.append(self.stopped_text.get(row, self.engine.decode(ids.tolist())))
        return texts

    def _check_stop(self, rows: Tensor, step: int) -> None:
        """End rows whose text now holds a stop string; the text is cut in front of it, the tokens stay."""
        for row in rows[~self.finished[rows]].tolist():
            text = self.engine.decode(self.ids[row, : step + 1].tolist())
            found = [at for stop in self.engine.stop if (at := text.find(stop)) >= 0]
            if found:
                self.finished[row] = True
                self.stopped_text[row] = text[: min(found)]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """Next-token logits of each row, [rows, V]."""
        kwargs = dict(self.engine.keep_last)
        if self.engine.takes_positions:
            kwargs["position_ids"] = positions
        output = self.engine.model(
            input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **kwargs
        )
        return output.logits[:, -1]
