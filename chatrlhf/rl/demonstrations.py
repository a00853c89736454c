"""Held-out demonstrations of the ACTOR stage as a rollout, so that RL can see whether its policy still knows them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from chatrlhf.data.collate import pad_right, prompt_batch
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.stage_rows import ActorRow, Demonstration
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.types import Rollout

MOST_ROWS = 64  # a forward over them is a part of each evaluation


def as_rollout(rows: Sequence[ActorRow], encoder: Encoder, distribution: SamplingDistribution) -> Rollout | None:
    """Demonstrations as if the policy had sampled their replies; None where no row can be read that way.

    Left out are plain text, rows beyond the context, and replies with an id that is never sampled.
    """
    kept: list[tuple[Demonstration, list[int], list[int]]] = []
    forbidden = set(distribution.forbidden_ids)
    for row in rows:
        if len(kept) == MOST_ROWS or not isinstance(row, Demonstration):
            continue
        prompt, reply = encoder.prompt(row.prompt), encoder.completion(row.prompt, row.completion)
        fits = len(prompt) + len(reply) <= encoder.max_length
        if prompt and reply and fits and forbidden.isdisjoint(reply):
            kept.append((row, prompt, reply))
    if not kept:
        return None
    pad_id = encoder.tokenizer.pad_token_id
    ids, mask = pad_right([reply for _, _, reply in kept], pad_id)
    return Rollout(
        prompts=prompt_batch([prompt for _, prompt, _ in kept], [row.prompt for row, _, _ in kept], pad_id),
        response_ids=ids,
        response_mask=mask,
        sampling_logprobs=torch.zeros(ids.shape),
        finished=torch.ones(len(kept), dtype=torch.bool),
        min_new_tokens=torch.zeros(len(kept), dtype=torch.int64),
        completions=[row.completion for row, _, _ in kept],
    )
