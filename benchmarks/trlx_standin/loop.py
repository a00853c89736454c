"""PPO the way trlX 0.7.0 does it, written anew as plainly as it can be: what it costs is what it is here for.

    rollouts   transformers' `generate`; texts for the reward function, which are then tokenized again; one forward of
               policy and of reference (a full copy) over prompt and response, each with a log-softmax of every logit;
               the KL term goes into the rewards; every row is kept by itself
    update     padded minibatches; a forward with all hidden states over prompt and response; a log-softmax of every
               logit; GAE and whitening anew in each minibatch; each statistic a number of its own; AdamW

All of it in float32. The value head, two layers, stands on the policy's trunk, and all weights are trained.

Where trlX's books are a token off (scores of rows shorter than their batch land behind their end), these are right:
the work is the same and the learning better.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.forced_lengths import ForcedLengths

# (prompts, completions) to one score each
Reward = Callable[[list[str], list[str]], Sequence[float]]


@dataclass(frozen=True)
class Settings:
    """trlX's knobs under its names, with its defaults."""

    max_new_tokens: int
    chunk_size: int  # rows generated and scored side by side
    batch_size: int  # rows per optimizer step
    ppo_epochs: int = 4
    lr: float = 3e-5
    betas: tuple[float, float] = (0.9, 0.95)
    init_kl_coef: float = 0.001
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    cliprange_reward: float = 10.0
    vf_coef: float = 1.0


@dataclass
class Element:
    """One rollout, without padding behind it."""

    query: Tensor  # [P], left-padded as it was generated
    query_mask: Tensor  # [P]
    response: Tensor  # [R]
    logprobs: Tensor  # [R]
    values: Tensor  # [R]
    rewards: Tensor  # [R]


class PolicyWithValueHead(nn.Module):
    """A language model with a head of two layers on its last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        hidden = model.config.hidden_size
        self.model = model
        self.value_head = nn.Sequential(nn.Linear(hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, 1))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, T, V] and values [B, T]."""
        output = self.model(**inputs(ids, mask), output_hidden_states=True)
        return output.logits, self.value_head(output.hidden_states[-1]).squeeze(-1)


@dataclass
class Batch:
    """Prompts as they are generated from."""

    input_ids: Tensor  # [B, P], left-padded
    attention_mask: Tensor  # [B, P]


class StandIn:
    """The loop over one policy.

    Args:
        model: the policy; in float32, its attention computed by plain products, as in 2023.
        decode, encode: ids without EOS to text, and back.
        eos: closes a response that ended by itself.
        pad: may be EOS, too.
    """

    def __init__(
        self,
        model: Any,
        settings: Settings,
        reward: Reward,
        decode: Callable[[list[int]], str],
        encode: Callable[[str], list[int]],
        eos: int,
        pad: int,
    ) -> None:
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.policy = PolicyWithValueHead(model).eval()  # dropout is off in trlX's forwards, too
        self.settings, self.reward, self.decode, self.encode = settings, reward, decode, encode
        self.eos, self.pad = eos, pad
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), lr=settings.lr, betas=settings.betas, weight_decay=1e-6
        )

    def iteration(self, prompts: Batch, lengths: Sequence[int] | None = None) -> dict[str, float]:
        """One round of rollouts and its update; the seconds of each phase, and the means of the statistics."""
        elements, seconds, rows = [], {"rollout": 0.0, "score": 0.0}, range(len(prompts.input_ids))
        for start in range(0, len(rows), self.settings.chunk_size):
            part = slice(start, start + self.settings.chunk_size)
            chunk = Batch(prompts.input_ids[part], prompts.attention_mask[part])
            began = time.perf_counter()
            samples = self.generate(chunk, lengths[part] if lengths else None)
            generated = time.perf_counter()
            elements += self.score(chunk, samples)
            seconds["rollout"] += generated - began
            seconds["score"] += time.perf_counter() - generated
        began = time.perf_counter()
        stats = self.update(elements)
        return (
            stats | seconds | {"update": time.perf_counter() - began, "tokens": sum(len(e.response) for e in elements)}
        )

    def generate(self, chunk: Batch, lengths: Sequence[int] | None = None) -> Tensor:
        """Prompts and responses, [B, P + R]; with ``lengths``, responses of just so many tokens."""
        width, limit = chunk.input_ids.shape[1], self.settings.max_new_tokens
        forced = [ForcedLengths(list(lengths), limit, width, self.eos, (self.pad,))] if lengths else []
        return self.policy.model.generate(
            input_ids=chunk.input_ids,
            attention_mask=chunk.attention_mask,
            logits_processor=forced,
            max_new_tokens=limit,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            eos_token_id=self.eos,
            pad_token_id=self.pad,
        )

    @torch.no_grad()
    def score(self, chunk: Batch, samples: Tensor) -> list[Element]:
        """Text, scores, tokens again, log-probabilities, values and rewards of a chunk."""
        settings, width = self.settings, chunk.input_ids.shape[1]
        prompts, outputs, ended = [], [], []
        for row, (query, mask) in enumerate(zip(chunk.input_ids, chunk.attention_mask.bool(), strict=True)):
            answer = samples[row, width:].tolist()
            ended.append(self.eos in answer)
            outputs.append(self.decode(answer[: answer.index(self.eos)] if ended[-1] else answer))
            prompts.append(self.decode(query[mask].tolist()))
        scores = torch.tensor(self.reward(prompts, outputs)).clamp(
            -settings.cliprange_reward, settings.cliprange_reward
        )
        responses = [
            torch.tensor(self.encode(text) + ([self.eos] if end else []))
            for text, end in zip(outputs, ended, strict=True)
        ]
        ids, mask = self.padded(list(zip(chunk.input_ids, chunk.attention_mask, responses, strict=True)))
        logits, values = self.policy(ids, mask)
        logprobs = all_logprobs(logits, ids)[:, width - 1 :]
        reference = all_logprobs(self.reference(**inputs(ids, mask)).logits, ids)[:, width - 1 :]
        penalty = -settings.init_kl_coef * (logprobs - reference)
        elements = []
        for row, response in enumerate(responses):
            length = len(response)
            rewards = penalty[row, :length].clone()
            rewards[-1] += scores[row]
            elements.append(
                Element(
                    query=chunk.input_ids[row],
                    query_mask=chunk.attention_mask[row],
                    response=response,
                    logprobs=logprobs[row, :length],
                    values=values[row, width - 1 : width - 1 + length],
                    rewards=rewards,
                )
            )
        return elements

    def update(self, elements: list[Element]) -> dict[str, float]:
        """All epochs; means of the statistics over all steps."""
        steps = []
        for _ in range(self.settings.ppo_epochs):
            for rows in torch.randperm(len(elements)).split(self.settings.batch_size):
                loss, stats = self.loss([elements[row] for row in rows.tolist()])
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                steps.append(stats)
        return {name: sum(stats[name] for stats in steps) / len(steps) for name in steps[0]}

    def loss(self, minibatch: list[Element]) -> tuple[Tensor, dict[str, float]]:
        """PPO's clipped objective and value loss over a padded minibatch, and what trlX logs of it."""
        settings, width = self.settings, len(minibatch[0].query)
        ids, mask = self.padded([(e.query, e.query_mask, e.response) for e in minibatch])
        old_logprobs, old_values, rewards = (
            pad_sequence([getattr(e, name) for e in minibatch], batch_first=True)
            for name in ("logprobs", "values", "rewards")
        )
        advantages, returns = self.advantages(old_values, rewards)
        logits, values = self.policy(ids, mask)
        logprobs, values = all_logprobs(logits, ids)[:, width - 1 :], values[:, width - 1 : -1]
        mask = mask[:, width:]
        count = mask.sum()
        near = torch.clamp(values, old_values - settings.cliprange_value, old_values + settings.cliprange_value)
        plain, clipped = (values - returns) ** 2, (near - returns) ** 2
        value_loss = 0.5 * (torch.max(plain, clipped) * mask).sum() / count
        log_ratio = (logprobs - old_logprobs) * mask
        ratio = log_ratio.exp()
        free = -advantages * ratio
        bound = -advantages * ratio.clamp(1 - settings.cliprange, 1 + settings.cliprange)
        policy_loss = (torch.max(free, bound) * mask).sum() / count
        loss = policy_loss + settings.vf_coef * value_loss
        with torch.no_grad():
            stats = {
                "loss/total": loss,
                "loss/policy": policy_loss,
                "loss/value": value_loss,
                "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
                "policy/clipfrac": ((bound > free) * mask).sum() / count,
                "values/clipfrac": ((clipped > plain) * mask).sum() / count,
                "values/error": (plain * mask).sum() / count,
                "ratio": (ratio * mask).sum() / count,
                "padding": 1 - count / mask.numel(),
            }
            for name, tensor in (("values", values), ("old_values", old_values), ("returns", returns)):
                stats |= {f"{name}/{what}": number for what, number in moments(tensor, mask, count).items()}
        return loss, {name: number.item() for name, number in stats.items()}

    def advantages(self, values: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened advantages and returns of a padded minibatch, [B, R] each; whitened with the padding, as in trlX."""
        settings, steps = self.settings, values.shape[1]
        found: list[Tensor] = []
        advantage = torch.zeros(len(values))
        for t in reversed(range(steps)):
            after = values[:, t + 1] if t + 1 < steps else 0.0
            delta = rewards[:, t] + settings.gamma * after - values[:, t]
            advantage = delta + settings.gamma * settings.lam * advantage
            found.append(advantage)
        advantages = torch.stack(found[::-1], dim=1)
        variance, mean = torch.var_mean(advantages)
        return (advantages - mean) * torch.rsqrt(variance + 1e-8), advantages + values

    def padded(self, rows: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(query, its mask, response) of each row to ids and mask, [B, P + R]; responses padded on the right."""
        responses = pad_sequence([response for _, _, response in rows], batch_first=True, padding_value=self.pad)
        real = pad_sequence([torch.ones_like(response) for _, _, response in rows], batch_first=True)
        queries, masks = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        return torch.cat([queries, responses], dim=1), torch.cat([masks.long(), real], dim=1)


def inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """What a forward over padded rows is given."""
    positions = (mask.cumsum(dim=1) - 1).masked_fill(mask == 0, 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def all_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log pi of each token behind the first, [B, T - 1], by a log-softmax of all logits."""
    return logits[:, :-1].log_softmax(dim=-1).gather(-1, ids[:, 1:, None]).squeeze(-1)


def moments(tensor: Tensor, mask: Tensor, count: Tensor) -> dict[str, Tensor]:
    """Mean, extremes and deviation over real tokens."""
    mean, real = (tensor * mask).sum() / count, mask.bool()
    return {
        "mean": mean,
        "min": tensor.masked_fill(~real, torch.inf).min(),
        "max": tensor.masked_fill(~real, -torch.inf).max(),
        "std": (((tensor - mean) * mask) ** 2).sum().div(count).sqrt(),
    }
