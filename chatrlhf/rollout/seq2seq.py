"""Decoding by an encoder–decoder: prompts are read once, and responses begin at the decoder's start token.

All rows of a chunk stand at the same place of the decoder, as models need that count positions from there (BART); so
rows that have ended leave, and no one takes their place before the chunk is done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from chatrlhf.models.loading.backbone import decoder_start
from chatrlhf.models.sequences import moved_left
from chatrlhf.rollout.decoding import Decoding, Slots
from chatrlhf.rollout.kv_cache import make_cache

if TYPE_CHECKING:
    from transformers import Cache


class Seq2SeqCache(EncoderDecoderCache):
    """Keys and values of the responses, written in place, those of the prompts, and what the encoder made of these."""

    def __init__(self, responses: DynamicCache, states: Tensor, mask: Tensor) -> None:
        """
        Args:
            states: [m, P, d], the encoder's last.
            mask: [m, P] bool.
        """
        super().__init__(responses, DynamicCache())
        self.states, self.mask = states, mask

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.states, self.mask = self.states[indices], self.mask[indices]


class Seq2SeqDecoding(Decoding):
    """`Decoding` where the rows' memory is of the responses alone."""

    def _read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Cache]:
        model = self.context.model
        ids, mask = moved_left(ids, mask)
        states = model.get_encoder()(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        # The decoder's own configuration: T5 counts its layers there.
        cache = Seq2SeqCache(make_cache(model.get_decoder().config), states, mask)
        first = torch.full_like(ids[:, :1], decoder_start(model.config))
        return self._forward(first, torch.ones_like(mask[:, :1]), torch.zeros_like(first), cache), cache

    def _begin(self, slots: Slots, mask: Tensor, cache: Cache, of_row: Tensor) -> None:
        super()._begin(slots, torch.ones_like(mask[:, :1]), cache, of_row)

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Seq2SeqCache) -> Tensor:
        output = self.context.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=cache.states),
            attention_mask=cache.mask.long(),
            decoder_input_ids=ids,
            decoder_attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[:, -1]
