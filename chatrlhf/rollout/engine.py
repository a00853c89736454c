"""The rollout engine: prompts in, sampled responses out, over any transformers language model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from chatrlhf.errors import DivergedError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.rollout.context import DecodeContext, Limits, forward_arguments
from chatrlhf.rollout.cuda_graphs import GraphStore, StaticDecoding
from chatrlhf.rollout.decoding import Decoding
from chatrlhf.rollout.kv_cache import all_in_place, make_cache
from chatrlhf.rollout.llama_cpu import LlamaStep, llama_step
from chatrlhf.rollout.seq2seq import Seq2SeqDecoding
from chatrlhf.types import PromptBatch, Rollout


@dataclass
class RolloutEngine:
    """Samples one response a prompt row, token by token, at most ``chunk_size`` rows side by side.

    A row that has ended makes room for the next prompt where the model's memory allows that (`kv_cache.all_in_place`);
    otherwise, and by an encoder–decoder, one chunk is decoded after the other.

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
    look_every: int | None = None  # steps between two looks at who has ended; None: as the device likes it
    static: bool | None = None  # decode by recorded steps (`cuda_graphs.py`); None: on a GPU
    fused_step: bool = True  # a Llama-like model's step may be taken without its modules, on a CPU (`llama_cpu.py`)
    moves_weights: bool = True  # may put them elsewhere in memory, for `llama_cpu.py`

    def __post_init__(self) -> None:
        self.graphs = GraphStore()
        self.direct: LlamaStep | None = None  # the model's step where it need not be asked itself
        self.paired = is_encoder_decoder(self.model.config)
        self.in_place = not self.paired and all_in_place(make_cache(self.model.config))

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
        max_new_tokens, min_new_tokens = self.limits.per_row(prompts.attention_mask.sum(dim=1))
        width = int(max_new_tokens.max())
        uniforms = torch.rand(len(prompts), width, generator=torch.Generator().manual_seed(seed))
        if rows is not None:
            prompts, max_new_tokens, min_new_tokens, uniforms = (
                prompts.select(rows),
                max_new_tokens[rows],
                min_new_tokens[rows],
                uniforms[rows],
            )
        size = self.chunk_size or len(prompts)
        ids, logprobs = torch.zeros(len(prompts), width, dtype=torch.long), torch.zeros(len(prompts), width)
        lengths = torch.zeros(len(prompts), dtype=torch.long)
        finished = torch.zeros(len(prompts), dtype=torch.bool)
        texts: list[str] = [""] * len(prompts)
        static = self.in_place and (device.type == "cuda" if self.static is None else self.static)
        context, kind = self._context(static), Seq2SeqDecoding if self.paired else Decoding
        # Prompts of one length side by side need little padding; samples of one prompt stay together.
        refills = self.in_place and size < len(prompts)
        by_length = torch.argsort(prompts.attention_mask.sum(dim=1), stable=True, descending=refills)
        for part in by_length.split(len(prompts) if refills else size):
            rows_of = (
                context,
                prompts.select(part),
                max_new_tokens[part],
                min_new_tokens[part],
                uniforms[part],
                size,
                device,
            )
            decoding = StaticDecoding(self.graphs, *rows_of) if static else kind(*rows_of)
            decoding.run()
            ids[part], logprobs[part] = decoding.ids[:, :width], decoding.logprobs[:, :width]
            lengths[part], finished[part] = decoding.lengths, decoding.finished
            for i, text in zip(part.tolist(), decoding.texts(), strict=True):
                texts[i] = text
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        ids = ids[:, :longest].masked_fill(~mask, self.pad_token_id)
        logprobs = logprobs[:, :longest].masked_fill(~mask, 0.0)
        broken = int((~logprobs.isfinite()).any(dim=1).sum())
        if broken:
            raise DivergedError(
                f"the policy's logits are not finite any more ({broken} of {len(prompts)} rollouts); go back to an "
                "earlier checkpoint with a lower trainer_config.actor_lr"
            )
        return Rollout(prompts, ids, mask, logprobs, finished, min_new_tokens, texts)

    def _context(self, static: bool) -> DecodeContext:
        """What this rollout's decoders read; the model's step on a CPU is made anew where its weights have moved."""
        if static or not self.in_place or not self.moves_weights or not self.fused_step:
            self.direct = None
        elif self.direct is None or not self.direct.is_valid:
            self.direct = llama_step(self.model)
        takes_positions, keep_last = forward_arguments(self.model)
        return DecodeContext(
            model=self.model,
            distribution=self.distribution,
            limits=self.limits,
            stop=self.stop,
            decode=self.decode,
            look_every=self.look_every,
            takes_positions=takes_positions,
            keep_last=keep_last,
            in_place=self.in_place,
            step=self.direct,
        )
