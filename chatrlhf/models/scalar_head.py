"""From a hidden state to one number: the head of reward models and critics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ScalarHead(nn.Module):
    """Linear, or one hidden layer as in ChatLLaMA (`model_head_hidden_size`). Always computed in float32."""

    def __init__(self, hidden_size: int, mlp_size: int | None = None) -> None:
        super().__init__()
        self.hidden_size, self.mlp_size = hidden_size, mlp_size
        self.hidden = _Linear(hidden_size, mlp_size) if mlp_size else None
        self.out = _Linear(mlp_size or hidden_size, 1)
        nn.init.normal_(self.out.weight, std=(self.out.in_features + 1) ** -0.5)
        nn.init.zeros_(self.out.bias)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: nn.Linear) -> ScalarHead:
        """A linear head with the weights of one that was trained elsewhere; a bias that it lacks starts at 0."""
        head = cls(linear.in_features).to(linear.weight.device)
        head.out.weight.copy_(linear.weight)
        if linear.bias is not None:
            head.out.bias.copy_(linear.bias)
        return head

    def forward(self, states: Tensor) -> Tensor:
        """[..., hidden_size] to [...], float32."""
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            if self.hidden is not None:
                states = torch.nn.functional.gelu(self.hidden(states))
            return self.out(states).squeeze(-1)

    @torch.no_grad()
    def zero_(self) -> ScalarHead:
        """Predict 0 everywhere, in place: a critic that knows nothing yet adds nothing to the advantages."""
        self.out.weight.zero_()
        self.out.bias.zero_()
        return self

    @torch.no_grad()
    def fold_(self, scale: float, shift: float) -> ScalarHead:
        """Make the output ``scale * output + shift``, in place."""
        self.out.weight.mul_(scale)
        self.out.bias.mul_(scale).add_(shift)
        return self


class _Linear(nn.Linear):
    """In float32 also where its weights are not: DeepSpeed casts all of a model."""

    def forward(self, states: Tensor) -> Tensor:
        return nn.functional.linear(states, self.weight.float(), self.bias.float())


def state_size(model: Any) -> int:
    """Width of a transformers model's last hidden states; OPT-350M projects them down to its embeddings."""
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size
