"""The rows in flight: each sits in a slot and says at most one token a step; ended ones make room for others."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chatrlhf.functional.logprobs import id_tensor, sample_by_inversion
from chatrlhf.rollout.context import DecodeContext
from chatrlhf.rollout.kv_cache import BatchKVCache, make_cache
from chatrlhf.runtime.fault_points import reached
from chatrlhf.types import PromptBatch

if TYPE_CHECKING:
    from transformers import Cache

# Rows that have ended leave, or make room for others, when this share of the slots has: to move the keys and values of
# those that stay, or to prefill a few prompts on their own, costs something.
LEAVE_AT = 1 / 8

# Steps between two looks at who has ended: a GPU stands still while the host waits for the answer. Rows that end in
# between go on in their slots, unheard.
LOOK_EVERY = {"cuda": 8}


@dataclass
class Slots:
    """What is known of n rows in flight; R tokens are the most that any of the rollout may say."""

    row: Tensor  # [n] int64, which row of the rollout sits there
    prompt_length: Tensor  # [n] int64
    max_new_tokens: Tensor  # [n] int64
    min_new_tokens: Tensor  # [n] int64
    uniforms: Tensor  # [n, R + 1] float32
    token: Tensor  # [n] int64, the newest one, which the model has not seen yet
    length: Tensor  # [n] int64, response tokens so far
    active: Tensor  # [n] bool, not ended
    finished: Tensor  # [n] bool, ended by EOS or a stop string
    ids: Tensor  # [n, R + 1] int64; what stands behind a row's length is of no meaning, here and in logprobs
    logprobs: Tensor  # [n, R + 1] float32

    def __len__(self) -> int:
        return len(self.row)

    def fields(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in dataclasses.fields(self)]

    def front(self, count: int) -> Slots:
        """The first ``count`` of them, in the same tensors."""
        return Slots(*(value[:count] for value in self.fields()))

    def keep(self, index: Tensor) -> Slots:
        """Slots ``index``, int64 and no more than there are, moved to the front of the same tensors."""
        for value in self.fields():
            value[: len(index)] = value[index]
        return self.front(len(index))

    def put(self, index: Tensor | slice, others: Slots) -> None:
        """Write other rows into slots ``index``, int64 where it is a tensor."""
        for value, new in zip(self.fields(), others.fields(), strict=True):
            value[index] = new


class Decoding:
    """The responses to B prompts, decoded in at most ``size`` slots.

    Where there are more prompts than slots they have to be sorted, the longest first: then the rows in flight hold at
    least as many tokens as a prompt that takes the place of one of them.
    """

    def __init__(
        self,
        context: DecodeContext,
        prompts: PromptBatch,
        max_new_tokens: Tensor,
        min_new_tokens: Tensor,
        uniforms: Tensor,
        size: int,
        device: torch.device,
    ) -> None:
        self.context, self.size, self.device = context, min(size, len(prompts)), device
        self.look_every = context.look_every or LOOK_EVERY.get(device.type, 1)
        self.prompt_ids, self.prompt_mask = prompts.input_ids.to(device), prompts.attention_mask.to(device)
        self.group_ids = prompts.group_ids.to(device)
        self.max_new_tokens, self.min_new_tokens = max_new_tokens.to(device), min_new_tokens.to(device)
        # As wide in each rollout; and one column more, where a row that has ended and waits in its slot draws.
        rows, width = len(prompts), min(context.limits.max_new_tokens, context.limits.max_length)
        self.uniforms = torch.nn.functional.pad(uniforms, (0, width + 1 - uniforms.shape[1])).to(device)
        self.admitted = 0  # prompts that have, or had, a slot
        self.stopped_text: dict[int, str] = {}
        self.read: dict[int, int] = {}  # tokens of each row in which stop strings have been looked for
        # What has been said, by row; on the host.
        self.ids, self.logprobs = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width)
        self.lengths, self.finished = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)

    def run(self) -> None:
        """Prefill as many prompts as there are slots, then draw one token a row and step until all have ended."""
        slots, ids, mask = self._admit(self.size)
        logits, cache, of_row = self._prefill(slots.row, ids, mask)
        self._begin(slots, mask, cache, of_row)
        self._draw(logits[of_row])
        # An operation then does not ask what autograd would have to know. A model that is asked itself may keep
        # something for its next forward, in an update; a direct step keeps nothing.
        with torch.inference_mode() if self.context.step is not None else nullcontext():
            while self._retire_and_refill():
                for _ in range(self.look_every):
                    self._step()

    def _begin(self, slots: Slots, mask: Tensor, cache: Cache, of_row: Tensor) -> None:
        """Take up the first rows, whose prompts are prefilled."""
        cache.batch_select_indices(of_row)
        self.slots, self.kv_cache = slots, BatchKVCache(cache, mask)

    def _step(self) -> None:
        """Show the model each row's newest token and draw the next one."""
        slots, mask, step = self.slots, self.kv_cache.extend(), self.context.step
        positions = slots.prompt_length + slots.length - 1
        if step is not None:
            self._draw(step(slots.token, positions, mask, self.kv_cache.cache))
        else:
            self._draw(self._forward(slots.token[:, None], mask, positions[:, None], self.kv_cache.cache))

    def _draw(self, logits: Tensor) -> None:
        """One token of each row from its next-token logits, [n, V]. Nothing is asked of the device."""
        reached("rollout.draw")
        slots, distribution, place = self.slots, self.context.distribution, self.slots.length[:, None]
        logits = distribution.adjust(logits, slots.length, slots.min_new_tokens)
        tokens, logprobs = sample_by_inversion(logits, slots.uniforms.gather(1, place).squeeze(1))
        slots.token.copy_(tokens)
        slots.ids.scatter_(1, place, tokens[:, None])
        slots.logprobs.scatter_(1, place, logprobs[:, None])
        ended = (tokens[:, None] == id_tensor(distribution.eos_token_ids, tokens.device)).any(dim=1)
        slots.finished |= ended & slots.active
        slots.length += slots.active
        slots.active &= ~ended & (slots.length < slots.max_new_tokens)

    def _retire_and_refill(self) -> bool:
        """See who has ended and give their slots to others; False once no one is left."""
        if self.context.stop:
            self._check_stop()
        slots, waiting = self.slots, len(self.ids) - self.admitted
        left = int(slots.active.sum())
        if left == 0 and waiting == 0:
            self._flush_finished()
            return False
        room = self._slot_budget(min(left + waiting, len(slots)))
        making_room = len(slots) - left >= LEAVE_AT * len(slots) and (waiting > 0 or room < len(slots))
        if making_room:
            self._flush_finished()
            if waiting:
                self._refill((~slots.active).nonzero().squeeze(-1)[:waiting])
            if room < len(slots):
                staying = torch.argsort(slots.active, descending=True, stable=True)[:room]
                self.slots = slots.keep(staying)
                self.kv_cache.keep(staying)
        if self.context.in_place and (making_room or self.kv_cache.grows(self.look_every)):
            self._compact()
        return True

    def _slot_budget(self, rows: int) -> int:
        """Slots to go on with where so many rows are left: whole eighths of those at the start.

        On the CPU measured, products of a number of rows that has not been seen before are compiled first, which takes
        longer than to compute some rows in vain.
        """
        eighth = max(1, self.size // 8)
        return min(len(self.slots), -(-rows // eighth) * eighth)

    def _refill(self, index: Tensor) -> None:
        """Give slots ``index`` to the next prompts.

        All of a prompt but its last token is prefilled and stands where the others' newest tokens stand; the last
        one goes through the next step together with those.
        """
        slots, ids, mask = self._admit(len(index))
        slots.token.copy_(ids[:, -1])
        self.slots.put(index, slots)
        _, cache, of_row = self._prefill(slots.row, ids[:, :-1], mask[:, :-1])
        self.kv_cache.write(index, mask[:, :-1], cache, of_row)

    def _compact(self) -> None:
        """Forget whole blocks of columns that are older than anything of the rows in flight."""
        slots = self.slots
        # One at least: to a memory of nothing the next step would be a prefill, with no room behind it.
        needed = max(1, int(((slots.prompt_length + slots.length - 1) * slots.active).max()))
        columns = (self.kv_cache.filled - needed) // self.kv_cache.block * self.kv_cache.block
        if columns:
            self.kv_cache.drop(columns)

    def _admit(self, count: int) -> tuple[Slots, Tensor, Tensor]:
        """The next prompts: slots for them, their ids and their mask, [count, P] each."""
        rows = torch.arange(self.admitted, self.admitted + count, device=self.device)
        self.admitted += count
        mask = self.prompt_mask[rows]
        used = mask.any(dim=0)
        ids, mask = self.prompt_ids[rows][:, used], mask[:, used]
        uniforms = self.uniforms[rows]
        slots = Slots(
            row=rows,
            prompt_length=mask.sum(dim=1),
            max_new_tokens=self.max_new_tokens[rows],
            min_new_tokens=self.min_new_tokens[rows],
            uniforms=uniforms,
            token=torch.zeros_like(rows),
            length=torch.zeros_like(rows),
            active=torch.ones_like(rows, dtype=torch.bool),
            finished=torch.zeros_like(rows, dtype=torch.bool),
            ids=torch.zeros_like(uniforms, dtype=torch.long),
            logprobs=torch.zeros_like(uniforms),
        )
        return slots, ids, mask

    def _prefill(self, rows: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Cache, Tensor]:
        """Forward of m rows of prompt tokens, [m, P] each, those of one group once.

        Returns:
            Next-token logits, [groups, V], none where P is 0; the cache; and where in both each row is, [m] int64.
        """
        groups, of_row = torch.unique(self.group_ids[rows], return_inverse=True)
        places = torch.arange(len(rows), device=self.device)
        first = torch.full_like(groups, len(rows)).scatter_reduce(0, of_row, places, "amin")
        with torch.inference_mode(False), torch.no_grad():
            return *self._read(ids[first], mask[first]), of_row

    def _read(self, ids: Tensor, mask: Tensor) -> tuple[Tensor | None, Cache]:
        """Next-token logits of prompts, [m, P] each, and the cache that holds them."""
        cache = make_cache(self.context.model.config)
        if not ids.shape[1]:
            return None, cache
        positions = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        return self._forward(ids, mask, positions, cache), cache

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Next-token logits of each row, [rows, V]."""
        kwargs = dict(self.context.keep_last)
        if self.context.takes_positions:
            kwargs["position_ids"] = positions
        if mask.dtype == torch.bool:
            mask = mask.long()
        output = self.context.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        return output.logits[:, -1]

    def _check_stop(self) -> None:
        """End rows whose text now holds a stop string; the text is cut in front of it, the tokens stay."""
        slots, ids = self.slots, self.slots.ids.tolist()
        for slot, (row, length, by_eos) in enumerate(
            zip(slots.row.tolist(), slots.length.tolist(), slots.finished.tolist(), strict=True)
        ):
            if row in self.stopped_text:
                continue
            # EOS is no part of the text.
            for end in range(self.read.get(row, 0) + 1, length + (not by_eos)):
                text = self.context.decode(ids[slot][:end])
                found = [at for stop in self.context.stop if (at := text.find(stop)) >= 0]
                if found:
                    slots.length[slot], slots.active[slot], slots.finished[slot] = end, False, True
                    self.stopped_text[row] = text[: min(found)]
                    break
            self.read[row] = length

    def _flush_finished(self) -> None:
        """Note down what the rows that have ended have said."""
        slots = self.slots
        ended = (~slots.active).nonzero().squeeze(-1)
        row = slots.row[ended].cpu()
        self.ids[row], self.logprobs[row] = slots.ids[ended, :-1].cpu(), slots.logprobs[ended, :-1].cpu()
        self.lengths[row], self.finished[row] = slots.length[ended].cpu(), slots.finished[ended].cpu()

    def texts(self) -> list[str]:
        """The response texts of all rows, without EOS and stop string."""
        eos, texts = self.context.distribution.eos_token_ids, []
        for row, length in enumerate(self.lengths.tolist()):
            ids = self.ids[row, :length].tolist()
            if row not in self.stopped_text and ids[-1] in eos:
                ids = ids[:-1]
            texts.append(self.stopped_text.get(row, self.context.decode(ids)))
        return texts
