"""What the RL stage holds while it samples and scores, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutput

from chatrlhf.config.schema import Config
from chatrlhf.functional.logprobs import sample_by_inversion
from chatrlhf.models.actor_critic import ActorCritic
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.reference import Reference
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.sequences import Sequences
from chatrlhf.models.sequences_seq2seq import sequences_for
from chatrlhf.rollout.kv_cache import make_cache, width_for
from chatrlhf.rollout.seq2seq import Seq2SeqCache
from chatrlhf.stages.build_ppo import DEFAULT_NEW_TOKENS
from chatrlhf.tools.plan.fake_run import GRADIENTS, FakeDevice, MemoryTracker
from chatrlhf.tools.plan.sft_reward_memory import OPTIMIZER, Phase, scores_of
from chatrlhf.tools.plan.zero_memory import Sharding

POLICY, CRITIC, REFERENCE, REWARD = "policy", "critic", "reference", "reward model"
MASTERS, CACHE, TRUNK = "float32 masters", "KV cache", "frozen trunk's states"
PREPARATION, ROLLOUT = "RL preparation", "RL rollout"
ROWS_SCORED = 64  # by a reward model at once: `RewardScorer.score_ids`


@dataclass(frozen=True)
class RolloutBatch:
    """What a device gets at once in RL."""

    rollouts: int  # of a step
    slots: int  # rows that are decoded side by side
    prompt: int  # tokens of the longest
    response: int  # tokens at most
    scored: int  # rows read at once before the update
    learned: int  # rows of a backward
    backwards: int  # of an optimizer step

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


def rollout_batch(config: Config, ranks: int, context: int, prompt: int | None) -> RolloutBatch:
    """As the configuration says, every row as long as it may be.

    Args:
        context: tokens that the actor can read.
        prompt: of the longest prompt, where the data are known.
    """
    trainer, actor, gen = config.trainer_config, config.actor_config, config.trainer_config.gen_kwargs
    longest = min(actor.max_sequence_length, context, gen.max_length or context)
    most = gen.max_new_tokens or actor.max_tokens or (longest if gen.max_length else DEFAULT_NEW_TOKENS)
    # Where prompts are not known they may be as long as leaves a whole response, or else half of all.
    own = min(prompt or max(longest - most, longest // 2), longest - 1)
    response = min(most, longest - own)
    rollouts = -(-trainer.num_rollouts // ranks)
    minibatch = -(-trainer.batch_size // ranks)
    micro = min(trainer.micro_batch_size, minibatch)
    scored = min(2 * trainer.micro_batch_size, rollouts)
    slots = min(trainer.chunk_size, rollouts)
    return RolloutBatch(rollouts, slots, own, response, scored, micro, -(-minibatch // micro))


def sequences_of(rows: int, actor_critic: ActorCritic, batch: RolloutBatch, fake_device: FakeDevice) -> Sequences:
    """Rows of one length as the policy reads them, on fake tensors."""
    prompt = torch.zeros(rows, batch.prompt, dtype=torch.long)
    response = torch.zeros(rows, batch.response, dtype=torch.long)
    real = sequences_for(actor_critic.policy.config)(prompt, prompt == 0, response, response == 0)
    tokens, slots = real.tokens, real.padded_slots

    def drawn(tensor: Tensor) -> Tensor:
        return fake_device.fake.from_tensor(tensor)

    given = {each.name: getattr(real, each.name) for each in fields(real)}
    made = type(real)(**{name: None if value is None else drawn(value) for name, value in given.items()})
    made.__dict__.update(tokens=drawn(tokens), padded_slots=drawn(slots), stream=None)
    return made


def opened(resident: list[tuple[str, list[Tensor]]], fake_device: FakeDevice) -> MemoryTracker:
    """A tracker of what is there before a phase begins."""
    tracker = fake_device.tracker(keeps_freed=True)
    for name, tensors in resident:
        tracker.track(tensors, name)
    return tracker


@torch.no_grad()
def rollout(actor_critic: ActorCritic, resident: list, batch: RolloutBatch, fake_device: FakeDevice) -> Phase:
    """Prompts are read, room is made for the longest response, and its last token is drawn, which no one reads."""
    policy, tracker = actor_critic.policy, opened(resident, fake_device)
    read = _read_by_encoder if is_encoder_decoder(policy.config) else _read_as_one
    with fake_device.tracking(tracker, padded=True):
        ids = torch.zeros(batch.slots, batch.prompt, dtype=torch.long)
        logits, caches, one_more = read(policy, ids, batch)
        _draw(actor_critic, logits)
        del logits
        for layer in chain(*(cache.layers for cache in caches)):
            _rename(layer, tracker)
        for layer in caches[0].layers if batch.response > 2 else ():
            rows, heads, _, size = layer.keys.shape
            more = layer.keys.new_zeros(rows, heads, batch.response - 2, size)
            layer.update(more, more)
            del more
            _rename(layer, tracker)
        _draw(actor_critic, one_more())
    return Phase(ROLLOUT, tracker.peak)


def _read_as_one(
    policy: nn.Module, ids: Tensor, batch: RolloutBatch
) -> tuple[Tensor, list[Cache], Callable[[], Tensor]]:
    """Logits behind the prompts, the cache that grows with the responses, and what gives the last token's logits."""
    cache = make_cache(policy.config)
    logits = policy(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def one_more() -> Tensor:
        read = batch.prompt + max(batch.response - 1, 1)
        mask = torch.ones(batch.slots, width_for(read), dtype=torch.long)
        position = torch.full((batch.slots, 1), read - 1)
        return policy(
            input_ids=ids[:, :1], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]

    return logits, [cache], one_more


def _read_by_encoder(
    policy: nn.Module, ids: Tensor, batch: RolloutBatch
) -> tuple[Tensor, list[Cache], Callable[[], Tensor]]:
    """The same, the prompts in a cache of their own, as `Seq2SeqDecoding` has it."""
    mask = torch.ones_like(ids)
    states = policy.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    cache = Seq2SeqCache(make_cache(policy.get_decoder().config), states, mask.bool())

    def one_more() -> Tensor:
        width, _ = cache.self_attention_cache.layers[0].get_mask_sizes(1)
        return policy(
            encoder_outputs=BaseModelOutput(last_hidden_state=cache.states),
            attention_mask=mask,
            decoder_input_ids=ids[:, :1],
            decoder_attention_mask=torch.ones(batch.slots, width, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]

    return one_more(), [cache.self_attention_cache, cache.cross_attention_cache], one_more


def _rename(layer: Any, tracker: MemoryTracker) -> None:
    for each in (layer.keys, layer.values):
        tracker.rename(each, CACHE)


def _draw(actor_critic: ActorCritic, logits: Tensor) -> None:
    places = torch.zeros(len(logits), dtype=torch.long)
    adjusted = actor_critic.distribution.adjust(logits, places, places)
    sample_by_inversion(adjusted, torch.zeros(len(logits)))


@torch.no_grad()
def scoring(
    actor_critic: ActorCritic,
    reference: Reference,
    reward: RewardModel | None,
    resident: list,
    batch: RolloutBatch,
    fake_device: FakeDevice,
) -> Phase:
    sequences = sequences_of(batch.scored, actor_critic, batch, fake_device)
    tracker = opened(resident, fake_device)
    with fake_device.tracking(tracker):
        sequences = replace_states(sequences, actor_critic.trunk_states(sequences))
        if sequences.trunk_states is not None:
            states = sequences.trunk_states
            kept = states.new_zeros(batch.rollouts, *states.shape[1:])
            tracker.rename(kept, TRUNK)
        actor_critic.evaluate(sequences, with_entropy=True)
        reference.logprobs(sequences)
        if reward is not None:
            scores_of(reward, torch.zeros(min(ROWS_SCORED, batch.rollouts), batch.tokens, dtype=torch.long))
    return Phase("RL scoring", tracker.peak)


def replace_states(sequences: Sequences, states: Tensor | None) -> Sequences:
    """The same with what a frozen trunk made of them."""
    sequences.trunk_states = states
    return sequences


def dealt_out(phase: Phase, sharding: Sharding, trained: int) -> Phase:
    """What is trained is sharded; a policy is whole while it samples, and what is frozen always."""
    parts, host = dict(phase.parts), 0
    if sharding.engine == "deepspeed":
        parts.pop(MASTERS, None)  # they are among its optimizer's states
    if phase.name == PREPARATION:
        return phase
    parts[OPTIMIZER], on_host = sharding.optimizer(trained, 4 * trained)
    host += on_host
    if sharding.stage >= 3 and phase.name != ROLLOUT:
        for name in (POLICY, CRITIC):
            if parts.get(name):
                parts[name], on_host = sharding.weights(parts[name], trained)
                host += on_host
    if gradients := parts.get(GRADIENTS):
        parts[GRADIENTS] = sharding.gradient(gradients) + sharding.in_transit(gradients, trained)
    return Phase(phase.name, {name: size for name, size in parts.items() if size}, host)
