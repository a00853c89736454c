"""Prompts for an encoder and responses for a decoder: the counterpart of rows that are joined.

Decoder input t is the start token for t = 0 and response token t - 1 behind it; what the decoder makes of it predicts
response token t, and is what V(t) is read from. So the start token is no part of a response and lies outside its mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.models.loading.backbone import decoder_start, is_encoder_decoder
from chatrlhf.models.sequences import Sequences, join, moved_left


@dataclass(kw_only=True)
class Seq2SeqSequences(Sequences):
    """B prompts, in ``input_ids`` and ``attention_mask`` [B, P], and what the decoder reads of their responses.

    ``slots`` point into B*R. Behind a response the decoder's input is of no meaning: no position before can see it.
    """

    decoder_ids: Tensor  # [B, R] int64

    def read(self, model: nn.Module, name: str) -> Tensor:
        output = model(
            input_ids=self.input_ids,
            attention_mask=self.attention_mask.long(),
            decoder_input_ids=self.decoder_ids,
            use_cache=False,
        )
        return getattr(output, name).flatten(0, 1).index_select(0, self.padded_slots)


def pair(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    min_new_tokens: Tensor | None = None,
    trunk_states: None = None,
    *,
    start: int,
) -> Seq2SeqSequences:
    """Prompts [B, P] (padding anywhere) and responses [B, R] (right-padded) as an encoder–decoder reads them.

    Args:
        trunk_states: none; an encoder–decoder has no trunk that is frozen.
        start: the decoder's start token.
    """
    input_ids, attention_mask = moved_left(prompt_ids, prompt_mask)
    rows, steps = response_mask.nonzero(as_tuple=True)
    if min_new_tokens is None:
        min_new_tokens = torch.zeros(len(prompt_ids), dtype=torch.long, device=prompt_ids.device)
    return Seq2SeqSequences(
        input_ids=input_ids,
        attention_mask=attention_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        slots=rows * response_ids.shape[1] + steps,
        positions=steps,
        min_new_tokens=min_new_tokens[rows],
        decoder_ids=shifted(response_ids, start),
    )


def shifted(response_ids: Tensor, start: int) -> Tensor:
    """What a decoder reads to predict responses [B, R]: the start token, and all of each but its last column."""
    return torch.nn.functional.pad(response_ids[:, :-1], (1, 0), value=start)


def sequences_for(config: Any) -> Callable[..., Sequences]:
    """`join`, or `pair` for a model of this configuration; they take the same arguments."""
    return partial(pair, start=decoder_start(config)) if is_encoder_decoder(config) else join
