"""The time t* below which no implementation of a piece of work can come on this machine.

Per sequence a forward over S tokens with logits at n of them is

    F(S, n) = 2 N S + 2 L d S^2 + 2 d V n        FLOP, N the backbone's parameters in matrix products

(causal attention counted once over the triangle). What is necessary: decoding each token once from a cache, one
forward of the reference, the critic and the reward model, and three forwards' worth of policy and critic an epoch.
A phase's bound is the sum of FLOP / rate and bytes / bandwidth over what cannot overlap: products and AdamW's pass
over its state in the update; the greater of the two in a decoding step.

Rates are measured at the model's own shapes: the FLOP-weighted harmonic mean over its matrix products.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.ppo_step.work import Work

# float32 weight, two moments and gradient read, weight and moments written.
ADAMW_BYTES = 28


@dataclass(frozen=True)
class Model:
    """What the bound needs to know of a Llama."""

    hidden: int
    layers: int
    vocab: int

    @property
    def inner(self) -> int:
        return round(self.hidden * 2.6875)

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of one layer's matrix products with weights."""
        d, f = self.hidden, self.inner
        return [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]

    @property
    def backbone(self) -> int:
        """N."""
        return self.layers * sum(a * b for a, b in self.linears)

    @property
    def parameters(self) -> int:
        """Of a policy: backbone, embeddings and head apart."""
        return self.backbone + 2 * self.vocab * self.hidden

    def forward(self, tokens: int, logits: int) -> float:
        """F(S, n), FLOP."""
        attention = 2 * self.layers * self.hidden * tokens**2
        return 2 * self.backbone * tokens + attention + 2 * self.hidden * self.vocab * logits


@dataclass(frozen=True)
class Rates:
    """What this machine does at the model's shapes."""

    train: float  # FLOP/s of forward and backward products at the tokens of a backward
    score: float  # FLOP/s of forward products at the tokens of a backward
    decode: float  # FLOP/s of forward products at one token a row
    bandwidth: float  # bytes/s of a copy, read and written both counted


def measure(work: Work, dtype: torch.dtype) -> Rates:
    """Measure all rates, on the machine's GPU where there is one; a few seconds."""
    model = Model(work.hidden, work.layers, work.vocab)
    lengths = work.lengths(0)
    rows = work.backward or work.minibatch
    tokens = round((work.prompt + sum(lengths) / len(lengths)) * rows)
    predicted = round(sum(lengths) / len(lengths) * rows)
    products = [(tokens, a, b) for a, b in model.linears] * model.layers + [(predicted, model.hidden, model.vocab)]
    steps = [(work.rollouts, a, b) for a, b in model.linears] * model.layers
    steps.append((work.rollouts, model.hidden, model.vocab))
    return Rates(
        train=_product_rate(products, dtype, backward=True),
        score=_product_rate(products, dtype, backward=False),
        decode=_product_rate(steps, dtype, backward=False),
        bandwidth=_bandwidth(),
    )


def bound(work: Work, rates: Rates, iteration: int, weight_bytes: int) -> dict[str, float]:
    """t* of each phase of one iteration, seconds."""
    model = Model(work.hidden, work.layers, work.vocab)
    lengths = work.lengths(iteration)
    totals = [work.prompt + length for length in lengths]
    decoded = sum(
        model.forward(total - 1, 0) + 2 * model.hidden * model.vocab * length
        for total, length in zip(totals, lengths, strict=True)
    )
    weights = weight_bytes * (model.backbone + model.vocab * model.hidden)
    cache_token = 2 * weight_bytes * model.layers * model.hidden
    read = sum(
        weights + cache_token * sum(work.prompt + step for length in lengths if length > step)
        for step in range(max(lengths))
    )
    forwards = sum(model.forward(total, length) for total, length in zip(totals, lengths, strict=True))
    trunks = sum(model.forward(total, 0) for total in totals)
    optimizer = ADAMW_BYTES * (model.parameters + model.parameters - model.vocab * model.hidden)
    return {
        "rollout": max(decoded / rates.decode, read / rates.bandwidth),
        "score": (forwards + 2 * trunks) / rates.score,
        "update": work.epochs
        * (3 * (forwards + trunks) / rates.train + work.minibatches * optimizer / rates.bandwidth),
    }


def _product_rate(shapes: list[tuple[int, int, int]], dtype: torch.dtype, backward: bool) -> float:
    """FLOP/s over x[m, a] @ w[a, b] of each shape, and over both products of its backward."""
    flop = seconds = 0.0
    for shape in sorted(set(shapes)):
        m, a, b = shape
        x, w, y = (torch.randn(size, device=_device()).to(dtype) for size in ((m, a), (b, a), (m, b)))
        count = shapes.count(shape)
        products: list[Callable[[], torch.Tensor]] = [lambda x=x, w=w: torch.nn.functional.linear(x, w)]
        if backward:
            products += [lambda y=y, w=w: y @ w, lambda y=y, x=x: y.T @ x]
        for product in products:
            flop += count * 2.0 * m * a * b
            seconds += count * _median_seconds(product)
    return flop / seconds


def _bandwidth() -> float:
    source, target = (torch.empty(2**27, device=_device()) for _ in range(2))  # half a GiB each
    return 2 * source.numel() * 4 / _median_seconds(lambda: target.copy_(source))


def _median_seconds(work: Callable[[], object], at_least: float = 0.05) -> float:
    """Median of single calls, for at least so many seconds and five calls; a GPU is given twenty at once."""
    work()
    calls = 20 if _device() == "cuda" else 1
    found: list[float] = []
    while len(found) < 5 or sum(found) < at_least:
        _wait()
        began = time.perf_counter()
        for _ in range(calls):
            work()
        _wait()
        found.append((time.perf_counter() - began) / calls)
    return sorted(found)[len(found) // 2]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _wait() -> None:
    """Until a GPU has done what was asked of it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
