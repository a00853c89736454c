"""A sequence classifier called whole, as its family pools."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from chatrlhf.models.loading.backbone import is_encoder_decoder


def own_scores(classifier: nn.Module, input_ids: Tensor, mask: Tensor, token_type_ids: Tensor | None) -> Tensor:
    """A classifier's only logit, [B] float32, for right-padded ids [B, T].

    Args:
        token_type_ids: [B, T]; None where it reads one text. Not every family has them.
    """
    # What stands under the mask is the model's own pad token: its family may find the end of a row by that.
    ids = input_ids.masked_fill(~mask, _fill(classifier))
    takes_types = "token_type_ids" in inspect.signature(classifier.forward).parameters
    types = {"token_type_ids": token_type_ids} if token_type_ids is not None and takes_types else {}
    return classifier(input_ids=ids, attention_mask=mask.long(), **types).logits[:, 0].float()


def can_batch(config: Any, input_ids: Tensor, mask: Tensor) -> bool:
    """Whether rows have what their classifier asks of a batch: encoder–decoders want the same number of EOS in each."""
    eos = config.eos_token_id
    if not is_encoder_decoder(config) or not isinstance(eos, int):
        return True
    counts = ((input_ids == eos) & mask).sum(dim=1)
    return bool((counts == counts[0]).all())


def token_types(input_ids: Tensor, separator: int) -> Tensor:
    """1 behind the first separator of a row, 0 up to it; [B, T] int64."""
    closing = (input_ids == separator).long()
    return (closing.cumsum(dim=1) - closing).clamp(max=1)


def _fill(classifier: nn.Module) -> int:
    pad = classifier.config.get_text_config().pad_token_id
    known = classifier.get_input_embeddings().num_embeddings
    return pad if isinstance(pad, int) and 0 <= pad < known else 0
