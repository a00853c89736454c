"""The network of a reward model: a backbone, a scalar head, pooling by mask, and its normalization."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from chatrlhf.models.kernels.packing import pack, supports_packing
from chatrlhf.models.loading.backbone import decoder_start, is_encoder_decoder
from chatrlhf.models.loading.lora import has_adapters, is_adapter
from chatrlhf.models.own_pooling import can_batch, own_scores, token_types
from chatrlhf.models.scalar_head import ScalarHead


class RewardModel(nn.Module):
    """score = scale * head(hidden state of the pooled token) + shift.

    Pooling is ``last`` for causal backbones and ``first`` for bidirectional ones, whose first token sees all. An
    encoder–decoder reads the text in its encoder and is read at its decoder's ``start`` token; the critic of one is
    read behind the ``reply``'s last token (`ReplyScorer`). A sequence classifier whose head is more than one linear
    layer is the backbone itself, has no head here, and pools in its ``own`` way.
    The head is trained on targets of mean 0 and deviation 1 (regression) or on differences (pairs); scale and
    shift bring its output back to the user's units, or to mean 0 and deviation 1 over the training
    completions, and are stored with it.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ScalarHead | None,
        pooling: str = "last",
        scale: float = 1.0,
        shift: float = 0.0,
        skipped: int | None = None,
        separator: int | None = None,
        takes_padding: bool = True,
    ) -> None:
        """
        Args:
            skipped: with ``last``, an id that is not read at the end of a row: a classifier's pad token.
            separator: with ``own``, the id that closes the first of two texts; token types are counted by it.
            takes_padding: False: rows are read one by one, because padding would change their scores.
        """
        super().__init__()
        self.backbone, self.head = backbone, head
        self.pooling, self.scale, self.shift = pooling, scale, shift
        self.skipped, self.separator, self.takes_padding = skipped, separator, takes_padding
        self.backbone.config.use_cache = False
        self.backbone.config.num_labels = 1  # TRL's trainer asks for it
        # TRL's trainer writes a pad token into it, and a classifier with its own pooling reads by that of its own.
        self.config = copy.deepcopy(backbone.config) if pooling == "own" else backbone.config
        self.register_state_dict_post_hook(_each_once)
        self.register_state_dict_post_hook(_without_base)

    @property
    def trunk(self) -> nn.Module:
        """The model under the head: what adapters are added to."""
        return self.backbone.base_model if self.pooling == "own" else self.backbone

    def head_weights(self) -> dict[str, Tensor]:
        """The head's weights by name; of a classifier with its own pooling all that are not in its trunk."""
        if self.head is not None:
            return self.head.state_dict()
        trunk = f"{self.backbone.base_model_prefix}."
        return {name: weight for name, weight in self.backbone.state_dict().items() if not name.startswith(trunk)}

    def load_head(self, weights: dict[str, Tensor]) -> None:
        """Take weights as `head_weights` gives them."""
        if self.head is not None:
            self.head.load_state_dict(weights)
        else:
            if weights.keys() != (own := self.head_weights()).keys():
                raise RuntimeError(f"it has {', '.join(sorted(weights))}, and the model {', '.join(sorted(own))}")
            self.backbone.load_state_dict(weights, strict=False)

    def add_model_tags(self, tags: Any) -> None:
        """TRL tags models for the hub; nothing is published from here."""

    # What a Trainer asks of a model.

    _keys_to_ignore_on_save = None

    def get_input_embeddings(self) -> nn.Module:
        """For noise on embeddings: of what reads the text, since T5's own are never called."""
        in_encoder = self.pooling in ("start", "own") and is_encoder_decoder(self.config)
        return (self.trunk.get_encoder() if in_encoder else self.backbone).get_input_embeddings()

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """For activations that are computed again."""
        self.backbone.gradient_checkpointing_enable(**kwargs)

    def raw(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """The head's output before normalization, [B], for ids [B, T] padded on either side.

        Args:
            token_type_ids: [B, T], with ``own`` pooling; None: as the separator says, where there is one.
        """
        mask = attention_mask.bool()
        # Padding to the right, whatever came in: then positions count from 0 and the result is the same.
        order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        types = None if token_type_ids is None else token_type_ids.gather(1, order)
        if types is None and self.separator is not None:
            types = token_types(input_ids, self.separator)
        if self.takes_padding and (self.pooling != "own" or can_batch(self.backbone.config, input_ids, mask)):
            return self._read(input_ids, mask, types)
        rows = [(slice(i, i + 1), slice(length)) for i, length in enumerate(mask.sum(dim=1).tolist())]
        return torch.cat([self._read(input_ids[r], mask[r], None if types is None else types[r]) for r in rows])

    def _read(self, input_ids: Tensor, mask: Tensor, types: Tensor | None) -> Tensor:
        """`raw` of right-padded rows, all at once."""
        if self.pooling == "own":
            return own_scores(self.backbone, input_ids, mask, types)
        if self.pooling == "last":  # a causal model: right-padding cannot reach the last real token
            last = torch.arange(len(mask), device=mask.device) * mask.shape[1] + self._last(input_ids, mask)
            stream = pack(input_ids, mask) if supports_packing(self.backbone) else None
            if stream is None:
                states = self.backbone(input_ids=input_ids).last_hidden_state
            else:
                states, last = self.backbone(**stream.inputs).last_hidden_state, stream.positions_of[last]
            return self.head(states.flatten(0, 1)[last])
        given = {"input_ids": input_ids, "attention_mask": mask.long()}
        if self.pooling == "start":
            given["decoder_input_ids"] = torch.full_like(input_ids[:, :1], decoder_start(self.config))
        return self.head(self.backbone(**given).last_hidden_state[:, 0])

    def _last(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """The column of each row's last token, [B]; where a token is skipped, of the last other one, or 0."""
        read = mask if self.skipped is None else mask & (input_ids != self.skipped)
        columns = torch.arange(mask.shape[1], device=mask.device)
        return (columns * read).argmax(dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SequenceClassifierOutput:
        """What TRL's RewardTrainer expects: ``.logits`` [B, 1], before normalization."""
        return SequenceClassifierOutput(logits=self.raw(input_ids, attention_mask)[:, None])

    def score(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Normalized scores, [B] float32."""
        # Not `raw` itself: a model that is sharded over ranks comes together where it is called.
        return self.scale * self(input_ids, attention_mask).logits[:, 0] + self.shift


def _each_once(module: nn.Module, state: dict[str, Tensor], *_: Any) -> None:
    """Leave out a weight's second names (T5's embeddings have three), which safetensors would not write."""
    seen: set[int] = set()
    for name, weight in list(state.items()):
        if weight.numel() and weight.data_ptr() in seen:
            del state[name]
        seen.add(weight.data_ptr())


def _without_base(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Of a reward model with adapters these and the head are its state: a checkpoint leaves the base out."""
    if not has_adapters(model.backbone):
        return
    trunk = f"{prefix}backbone.{model.backbone.base_model_prefix}." if model.pooling == "own" else f"{prefix}backbone."
    for name in [name for name in state if name.startswith(trunk) and not is_adapter(name)]:
        del state[name]
