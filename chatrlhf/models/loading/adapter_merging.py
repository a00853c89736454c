"""Adding adapters to a model's weights, and comparing what comes out with peft's own forward."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from chatrlhf.errors import WeightsError
from chatrlhf.models.loading.adapter_loading import explained_adapters, wrapped
from chatrlhf.models.loading.backbone import is_encoder_decoder, read_by
from chatrlhf.models.loading.error_texts import listed
from chatrlhf.models.loading.vocabulary_rows import unfilled

# Of outputs that may differ, in their standard deviations: by rounding in float32, and to 16 bits.
ROUNDING, ROUNDING_16 = 1e-3, 0.05
FEW_TOKENS = (2, 8)  # on which outputs are compared; a large model on a CPU takes seconds for them


@dataclass(frozen=True)
class Comparison:
    """Outputs of the merged model and of base and adapters, both in the type they are kept in."""

    difference: float  # root of the mean square
    spread: float  # standard deviation of the outputs
    dtype: torch.dtype

    @property
    def is_rounding(self) -> bool:
        """Whether they differ by no more than rounding does."""
        return self.difference <= (ROUNDING if self.dtype == torch.float32 else ROUNDING_16) * self.spread


def merged(model: nn.Module, folder: str | Path) -> nn.Module:
    """A model with the adapters of a folder added to its weights; no adapter is left, and all of it can be trained.

    Raises:
        WeightsError: they cannot be restored (`wrapped`), or what comes out computes something else than peft does.
    """
    adapted = wrapped(model, folder)
    result, compared = merge(adapted, folder, FEW_TOKENS)
    if not compared.is_rounding:
        raise WeightsError(
            f"{folder}: merged into their base, these adapters compute something else than apart: outputs differ by "
            f"{compared.difference:.3g}, at a standard deviation of {compared.spread:.3g}; train low-rank adapters "
            "(LORA) without variants that cannot be merged"
        )
    # peft has frozen what the adapters were added to.
    return result.requires_grad_(True)


def merge(
    adapted: nn.Module, folder: str | Path, tokens: tuple[int, int], dtype: torch.dtype | None = None
) -> tuple[nn.Module, Comparison]:
    """A model that peft has wrapped, with its adapters added, and how its outputs compare.

    Args:
        folder: of the adapters, for messages.
        tokens: rows and length of random ids to compare on.
        dtype: of the result, where the sum is to be taken in float32; None: the sum is taken in the type they have.

    Raises:
        WeightsError: rows of added tokens are in neither base nor adapters, or such adapters cannot be merged.
    """
    config = adapted.get_base_model().config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.get_text_config().vocab_size, tokens, generator=generator).to(adapted.device)
    apart = _outputs(adapted.eval(), ids)
    _untie(adapted)
    # Summed in float32: in 16 bits the small product of the adapters would be rounded before it is added.
    adapted = adapted if dtype is None else adapted.float()
    with explained_adapters(folder, "merged into weights"):
        result = adapted.merge_and_unload()
    result = result if dtype is None else result.to(dtype)
    _settle_ties(result, folder)
    if lacking := unfilled(result):
        raise WeightsError(
            f"{folder}: these adapters were trained with added tokens, whose rows of {listed(lacking)} are neither in "
            "them nor in their base; name the base that the tokens were added to in adapter_config.json"
        )
    difference = float((_outputs(result, ids) - apart).square().mean().sqrt())
    return result, Comparison(difference, float(apart.std()), next(result.parameters()).dtype)


def _settle_ties(model: nn.Module, folder: str | Path) -> None:
    """Say in the configuration whether head and embeddings are one tensor still, or the next load would tie them again.

    Raises:
        WeightsError: of an encoder-decoder's embeddings one name was changed, which its encoder does not use.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if is_encoder_decoder(model.config):
        if model.get_encoder().get_input_embeddings().weight is not embeddings.weight:
            raise WeightsError(
                f"{folder}: these adapters change embeddings that encoder and decoder have under other names, which "
                "cannot be merged; train adapters on other layers"
            )
    elif head is not None and head.weight is not embeddings.weight:
        model.config.get_text_config().tie_word_embeddings = False


def _untie(adapted: nn.Module) -> None:
    """Give layers with adapters weights of their own where others have the same: a head that is tied to embeddings.

    peft adds to one of them; merged into the one tensor, it would be added to both. Rows of trained tokens are in both.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    uses = Counter(id(weight) for _, weight in adapted.named_parameters(remove_duplicate=False))
    for layer in adapted.modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue
        base = layer.get_base_layer()
        weight = getattr(base, "weight", None)
        if isinstance(weight, nn.Parameter) and uses[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            uses[id(weight)] -= 1


@torch.no_grad()
def _outputs(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits, or the last hidden states of a model without a head."""
    out = model(**read_by(model.config, ids))
    return (out.last_hidden_state if getattr(out, "logits", None) is None else out.logits).float()
