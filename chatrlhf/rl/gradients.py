"""The gradient of a minibatch: summed over its microbatches and over ranks in float32, then clipped."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from chatrlhf.runtime.collectives import sum_in_place


class Gradients:
    """One flat buffer for each group of parameters; what the optimizer finds as ``grad`` are views of it.

    So a sum is written where it stays, and ranks' sums, norms and clipping are one pass over a group each.
    """

    def __init__(self, groups: list[list[nn.Parameter]], weights: list[nn.Parameter]) -> None:
        """
        Args:
            groups: what the optimizer improves, float32.
            weights: for each of these, in their order, the one that a backward leaves a gradient with: it itself or,
                where it is a master, its working copy.
        """
        self.groups, self.weights = groups, weights
        self.parameters = [each for group in groups for each in group]
        self.flat: list[Tensor] = []
        self.views: list[Tensor] = []
        self.reached: list[bool] = []

    def forget(self) -> None:
        """Free the gradients of the last minibatch, buffers included.

        There is none before the first backward is done: what that needs for itself, a minibatch's activations, is gone
        by then.
        """
        self.flat, self.views = [], []
        self.reached = [False] * len(self.weights)
        for each in (*self.parameters, *self.weights):
            each.grad = None

    @torch.no_grad()
    def collect(self) -> None:
        """Add what a backward has left with the weights, and free it there."""
        if not self.flat:
            self._make_room()
        for i, weight in enumerate(self.weights):
            if weight.grad is None:
                continue
            if self.reached[i]:
                self.views[i].add_(weight.grad)
            else:
                self.views[i].copy_(weight.grad)
                self.reached[i] = True
            weight.grad = None

    @torch.no_grad()
    def finish(self) -> None:
        """Add up over ranks, once a step, and hand over to the optimizer.

        A parameter that nothing has reached gets no gradient: the optimizer leaves it alone, its decay included.
        """
        for view, reached in zip(self.views, self.reached, strict=True):
            if not reached:
                view.zero_()
        anywhere = torch.tensor(self.reached, dtype=torch.float32)
        sum_in_place([*self.flat, anywhere])
        for parameter, view, reached in zip(self.parameters, self.views, anywhere.tolist(), strict=True):
            parameter.grad = view if reached else None

    @torch.no_grad()
    def clip(self, max_norm: float | None) -> list[Tensor]:
        """Clip each group by a norm of its own; returns the norms before, 0-d each.

        So a critic far from its target does not slow the policy down.
        """
        norms = [torch.linalg.vector_norm(flat) for flat in self.flat]
        if max_norm is not None:
            for flat, norm in zip(self.flat, norms, strict=True):
                flat.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norms

    def _make_room(self) -> None:
        for group in self.groups:
            sizes = [each.numel() for each in group]
            self.flat.append(torch.empty(sum(sizes), device=group[0].device))
            parts = zip(self.flat[-1].split(sizes), group, strict=True)
            self.views += [part.view_as(each) for part, each in parts]
