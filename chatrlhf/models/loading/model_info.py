"""How large a model is, and how much it can read."""

from __future__ import annotations

import hashlib
import json

from torch import nn

from chatrlhf.models.loading.rope import positions


def context_length(model: nn.Module) -> int:
    """Tokens a model can take; a large number for models without a bound (ALiBi)."""
    return positions(model.config) - _unused_positions(model)


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_count(model: nn.Module) -> int:
    """Parameters that are trained, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters' names, shapes and which are frozen: equal for models that can exchange states."""
    shapes = sorted(
        (name, list(parameter.shape) + ([] if parameter.requires_grad else ["frozen"]))
        for name, parameter in model.named_parameters()
    )
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def _unused_positions(model: nn.Module) -> int:
    """Rows of a position table that no token gets: RoBERTa and its kin count from behind their pad token."""
    tables = (each for name, each in model.named_modules() if name.endswith("position_embeddings"))
    return next((each.padding_idx + 1 for each in tables if getattr(each, "padding_idx", None) is not None), 0)
