"""The frozen model that the KL term holds the policy to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.sequences import Sequences, response_logits, response_logprobs
from chatrlhf.models.weight_sharing import copy_sharing_frozen


class Reference:
    """A model that no one trains."""

    def __init__(self, model: nn.Module, distribution: SamplingDistribution) -> None:
        self.model, self.distribution = model.eval().requires_grad_(False), distribution

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        """[B, R] float32, of the same distribution that is sampled; 0 where masked."""
        logits = response_logits(self.model, sequences)
        return response_logprobs(logits, sequences, self.distribution)[0]


def reference_of(policy: nn.Module, distribution: SamplingDistribution) -> Reference:
    """The reference of a policy as it is now, on the weights of it that are not trained.

    Of a policy with adapters that is the policy with those it has now: without them it would be their base, which is
    not what fine-tuning has made.
    """
    return Reference(copy_sharing_frozen(policy), distribution)
