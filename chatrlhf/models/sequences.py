"""Prompt and response joined into one row each, and a causal model read at the response positions.

What an encoder–decoder reads is in `pairs.py`; all that is done with either is here.

Rows stand padded to the right, or packed behind each other into one stream without padding, where a model can
tell them apart (`packing.py`). Right-padding needs no attention mask in a causal model: what stands behind a real
token cannot reach it. Either way neither the width of the padding nor its side can change a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution, token_logprobs
from chatrlhf.models.kernels.packing import Stream, pack, pad_to_multiple, supports_packing
from chatrlhf.models.loading.backbone import backbone_of, read_by
from chatrlhf.models.traits import traits_of


@dataclass
class Sequences:
    """B rows of prompt + response. Legend: T = longest row, N = real response tokens of all rows."""

    input_ids: Tensor  # [B, T] int64, right-padded
    attention_mask: Tensor  # [B, T] bool
    response_ids: Tensor  # [B, R] int64
    response_mask: Tensor  # [B, R] bool
    slots: Tensor  # [N] int64, index into B*T of the position that predicts each real response token
    positions: Tensor  # [N] int64, t of each real response token
    min_new_tokens: Tensor  # [N] int64, of each token's row
    trunk_states: Tensor | None = None  # [B, T, d], what a frozen trunk made of the ids, where that is known

    @cached_property
    def tokens(self) -> Tensor:
        """The real response tokens, [N]."""
        return self.response_ids[self.response_mask]

    @cached_property
    def stream(self) -> Stream | None:
        """The rows packed; None where all are of one length and nothing is gained."""
        return pack(self.input_ids, self.attention_mask)

    @cached_property
    def stream_slots(self) -> Tensor:
        """`slots` in the stream, in whole quanta: [N or a little more]."""
        return pad_to_multiple(self.stream.positions_of[self.slots])

    @cached_property
    def padded_slots(self) -> Tensor:
        """`slots` in whole quanta: [N or a little more]."""
        return pad_to_multiple(self.slots)

    def read(self, model: nn.Module, name: str) -> Tensor:
        """One field of a model's output at the positions that predict the response tokens.

        [N, .], and behind them some rows of no meaning that make their number a whole one of quanta.

        Args:
            model: a transformers model, with a head or without.
            name: ``last_hidden_state`` or ``logits``.
        """
        if takes_stream(getattr(model, "base_model", model), self):
            output = getattr(model(**self.stream.inputs, use_cache=False), name)
            return output[0].index_select(0, self.stream_slots)
        output = getattr(model(input_ids=self.input_ids, use_cache=False), name)
        return output.flatten(0, 1).index_select(0, self.padded_slots)

    def spread(self, values: Tensor) -> Tensor:
        """One number a real token, [N], back in its place in [B, R]; 0 where masked."""
        empty = values.new_zeros(self.response_mask.shape)
        return empty.masked_scatter(self.response_mask, values)


def join(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    response_ids: Tensor,
    response_mask: Tensor,
    min_new_tokens: Tensor | None = None,
    trunk_states: Tensor | None = None,
) -> Sequences:
    """Join prompts [B, P] (padding anywhere) and responses [B, R] (right-padded) into right-padded rows.

    Each row needs at least one prompt token: the first response token is predicted by the last prompt token.
    States [B, at least T, d] are those of such rows already; what stands behind the longest is cut off.
    """
    ids, mask = moved_left(torch.cat([prompt_ids, response_ids], dim=1), torch.cat([prompt_mask, response_mask], dim=1))
    width = ids.shape[1]
    rows, steps = response_mask.nonzero(as_tuple=True)
    prompt_lengths = prompt_mask.sum(dim=1)
    if min_new_tokens is None:
        min_new_tokens = torch.zeros_like(prompt_lengths)
    return Sequences(
        input_ids=ids,
        attention_mask=mask,
        response_ids=response_ids,
        response_mask=response_mask,
        slots=rows * width + prompt_lengths[rows] - 1 + steps,
        positions=steps,
        min_new_tokens=min_new_tokens[rows],
        trunk_states=None if trunk_states is None else trunk_states[:, :width],
    )


def moved_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The real tokens of ids and mask, [B, T] each, from the left and in their order; as wide as the longest row."""
    order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    lengths = mask.sum(dim=1)
    width = int(lengths.max())
    return ids.gather(1, order)[:, :width], torch.arange(width, device=ids.device) < lengths[:, None]


def takes_stream(backbone: nn.Module, sequences: Sequences) -> bool:
    """Whether these rows go through a model packed."""
    return supports_packing(backbone) and sequences.stream is not None


def laid_out(states: Tensor, backbone: nn.Module, sequences: Sequences) -> Tensor:
    """States of padded rows, [B, T, d], as they stand in a model that is given the sequences: these, or [1, M, d]."""
    if takes_stream(backbone, sequences):
        return states.flatten(0, 1).index_select(0, sequences.stream.padded_of)[None]
    return states


def response_states(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """Last hidden states at the positions that predict the response tokens; [N, d] and more, as `Sequences.read`."""
    return sequences.read(backbone, "last_hidden_state")


def response_logits(model: nn.Module, sequences: Sequences, states: Tensor | None = None) -> Tensor:
    """A model's logits for the real response tokens; [N, V] with rows of no meaning behind, as above.

    Args:
        model: a transformers model with a language-modeling head.
        states: `response_states` of its backbone, where the caller has them.
    """
    if head_is_plain(model):
        if states is None:
            states = response_states(backbone_of(model), sequences)
        return model.get_output_embeddings()(states)
    return sequences.read(model, "logits")


def response_logprobs(
    logits: Tensor, sequences: Sequences, distribution: SamplingDistribution, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of the sampled tokens, and the entropies where asked for, each [B, R] float32."""
    logprobs, entropy = token_logprobs(
        logits, sequences.tokens, sequences.positions, sequences.min_new_tokens, distribution, with_entropy
    )
    return sequences.spread(logprobs), sequences.spread(entropy) if entropy is not None else None


@torch.no_grad()
def head_is_plain(model: nn.Module) -> bool:
    """Whether a model's logits are its output embedding applied to its last hidden states, and nothing more.

    Tried once a model on three tokens, because some families cap or scale their logits (T5 does, Flan-T5 does not);
    for those the whole model is run. The answer is kept with the model.
    """
    traits = traits_of(model)
    if traits.head_is_plain is None:
        training = model.training
        model.eval()
        ids = torch.arange(3, device=next(model.parameters()).device)[None]
        head = model.get_output_embeddings()
        if head is None:
            traits.head_is_plain = False
        else:
            # The head's input is enlarged for both, so that a cap far above a new model's logits shows too.
            enlarge = head.register_forward_pre_hook(lambda _, inputs: (100 * inputs[0],))
            given = read_by(model.config, ids)
            plain = head(backbone_of(model)(**given, use_cache=False).last_hidden_state).float()
            # In float32: BART adds a bias of that to logits in bfloat16.
            logits = model(**given, use_cache=False).logits.float()
            traits.head_is_plain = torch.allclose(plain, logits, rtol=1e-4, atol=1e-5)
            enlarge.remove()
        model.train(training)
    return traits.head_is_plain


@torch.no_grad()
def is_causal(backbone: nn.Module) -> bool:
    """Whether a position's state is independent of what follows it; tried on four tokens."""
    training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    ids = torch.tensor([[1, 2, 3, 1], [1, 2, 3, 4]], device=device)
    states = backbone(input_ids=ids).last_hidden_state[:, :3].float()
    backbone.train(training)
    return torch.allclose(states[0], states[1], rtol=1e-4, atol=1e-5)
