"""Traits of a model's family that are found by trying, once, while the model is whole.

What a family computes between its last hidden states and its logits, and whether it reads packed rows, stands in no
configuration. Both are tried on a few tokens; the answers stay with the model and go with it into its copies, so that
a copy whose weights are sharded or frozen elsewhere is never asked.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

NAME = "chatrlhf_traits"  # attribute of the model


@dataclass
class ModelTraits:
    """Answers so far; None: not tried yet."""

    head_is_plain: bool | None = None  # logits are the output embedding applied to the last hidden states
    packed_is_padded: bool | None = None  # packed rows get the states of padded ones, by this package's attention


def traits_of(model: nn.Module) -> ModelTraits:
    """A model's traits, to be read and filled in."""
    traits = model.__dict__.get(NAME)
    if traits is None:
        traits = model.__dict__[NAME] = ModelTraits()
    return traits
