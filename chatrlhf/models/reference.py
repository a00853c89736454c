"""The frozen model that the KL term holds the policy to, in as little memory as the policy allows."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.adapters import as_reference, has_adapters
from chatrlhf.models.sequences import Sequences, response_logits, response_logprobs


class Reference:
    """A model of its own."""

    def __init__(self, model: nn.Module, distribution: SamplingDistribution) -> None:
        self.model, self.distribution = model.eval().requires_grad_(False), distribution

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        """[B, R] float32, of the same distribution that is sampled; 0 where masked."""
        logits = response_logits(self.model, sequences)
        return response_logprobs(logits, sequences, self.distribution)[0]


class AdaptersAside(Reference):
    """The policy itself with the adapters it started from, or with none: weights that nobody trains."""

    def __init__(self, policy: nn.Module, distribution: SamplingDistribution) -> None:
        self.model, self.distribution = policy, distribution

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        with as_reference(self.model):
            return super().logprobs(sequences)


def reference_of(policy: nn.Module, distribution: SamplingDistribution) -> Reference:
    """The reference of a policy as it is now."""
    if has_adapters(policy):
        return AdaptersAside(policy, distribution)
    return Reference(copy_of_trained(policy), distribution)


def copy_of_trained(model: nn.Module) -> nn.Module:
    """A copy of a model that shares the weights which are not trained, since they will stay equal."""
    frozen = {id(each): each for each in model.parameters() if not each.requires_grad}
    return copy.deepcopy(model, frozen)
