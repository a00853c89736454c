"""What the RL stage holds in each of its phases: sampling, scoring, learning."""

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
from chatrlhf.functional.losses import policy_loss, value_loss
from chatrlhf.models.actor_critic import PolicyOnly
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.reference import Reference
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.sequences import Sequences
from chatrlhf.models.sequences_seq2seq import sequences_for
from chatrlhf.rl.gradients import Gradients
from chatrlhf.rl.master_weights import MasterWeights
from chatrlhf.rollout.kv_cache import make_cache, width_for
from chatrlhf.rollout.seq2seq import PairedCache
from chatrlhf.runtime.cpu_parallel import side_by_side
from chatrlhf.stages.build_ppo import DEFAULT_NEW_TOKENS
from chatrlhf.tools.plan.fake_run import ACTIVATIONS, GRADIENTS, Ledger, Paper
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


def sequences_of(rows: int, topology: PolicyOnly, batch: RolloutBatch, paper: Paper) -> Sequences:
    """Rows of one length as the policy reads them, on paper."""
    prompt = torch.zeros(rows, batch.prompt, dtype=torch.long)
    response = torch.zeros(rows, batch.response, dtype=torch.long)
    real = sequences_for(topology.policy.config)(prompt, prompt == 0, response, response == 0)
    tokens, slots = real.tokens, real.padded_slots

    def drawn(tensor: Tensor) -> Tensor:
        return paper.fake.from_tensor(tensor)

    given = {each.name: getattr(real, each.name) for each in fields(real)}
    made = type(real)(**{name: None if value is None else drawn(value) for name, value in given.items()})
    made.__dict__.update(tokens=drawn(tokens), padded_slots=drawn(slots), stream=None)
    return made


def _opened(resident: list[tuple[str, list[Tensor]]], paper: Paper) -> Ledger:
    ledger = paper.ledger(keeps_freed=True)
    for name, tensors in resident:
        ledger.hold(tensors, name)
    return ledger


@torch.no_grad()
def rollout(topology: PolicyOnly, resident: list, batch: RolloutBatch, paper: Paper) -> Phase:
    """Prompts are read, room is made for the longest response, and its last token is drawn, which nobody reads."""
    policy, ledger = topology.policy, _opened(resident, paper)
    read = _read_by_encoder if is_encoder_decoder(policy.config) else _read_as_one
    with paper.computing(ledger, padded=True):
        ids = torch.zeros(batch.slots, batch.prompt, dtype=torch.long)
        logits, caches, one_more = read(policy, ids, batch)
        _draw(topology, logits)
        del logits
        for layer in chain(*(cache.layers for cache in caches)):
            _rename(layer, ledger)
        for layer in caches[0].layers if batch.response > 2 else ():
            rows, heads, _, size = layer.keys.shape
            more = layer.keys.new_zeros(rows, heads, batch.response - 2, size)
            layer.update(more, more)
            del more
            _rename(layer, ledger)
        _draw(topology, one_more())
    return Phase(ROLLOUT, ledger.peak)


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
    """The same, the prompts in a cache of their own, as `PairedDecoding` has it."""
    mask = torch.ones_like(ids)
    states = policy.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    cache = PairedCache(make_cache(policy.get_decoder().config), states, mask.bool())

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


def _rename(layer: Any, ledger: Ledger) -> None:
    for each in (layer.keys, layer.values):
        ledger.rename(each, CACHE)


def _draw(topology: PolicyOnly, logits: Tensor) -> None:
    places = torch.zeros(len(logits), dtype=torch.long)
    adjusted = topology.distribution.adjust(logits, places, places)
    sample_by_inversion(adjusted, torch.zeros(len(logits)))


@torch.no_grad()
def scoring(
    topology: PolicyOnly,
    reference: Reference,
    reward: RewardModel | None,
    resident: list,
    batch: RolloutBatch,
    paper: Paper,
) -> Phase:
    sequences = sequences_of(batch.scored, topology, batch, paper)
    ledger = _opened(resident, paper)
    with paper.computing(ledger):
        sequences = replace_states(sequences, topology.trunk_states(sequences))
        if sequences.trunk_states is not None:
            states = sequences.trunk_states
            kept = states.new_zeros(batch.rollouts, *states.shape[1:])
            ledger.rename(kept, TRUNK)
        topology.evaluate(sequences, with_entropy=True)
        reference.logprobs(sequences)
        if reward is not None:
            scores_of(reward, torch.zeros(min(ROWS_SCORED, batch.rollouts), batch.tokens, dtype=torch.long))
    return Phase("RL scoring", ledger.peak)


def update(
    topology: PolicyOnly,
    groups: list[dict],
    masters: MasterWeights | None,
    resident: list,
    batch: RolloutBatch,
    paper: Paper,
    config: Config,
) -> Phase:
    """Two backwards, where a minibatch has as many: behind the first there is room for the sums of gradients."""
    ledger = _opened(resident, paper)
    sequences = sequences_of(batch.learned, topology, batch, paper)
    improved = [each for group in groups for each in group["params"]]
    weights = masters.working(improved) if masters is not None else improved
    gradients = Gradients([group["params"] for group in groups], weights)
    hooks = [
        each.register_post_accumulate_grad_hook(lambda weight: ledger.rename(weight.grad, GRADIENTS))
        for each in weights
    ]
    gradients.forget()
    with paper.computing(ledger):
        with torch.no_grad():
            states = topology.trunk_states(sequences)
            sequences = replace_states(sequences, states)
            if states is not None:
                kept = states.new_zeros(batch.rollouts, *states.shape[1:])
                ledger.rename(kept, TRUNK)
        # A second minibatch finds the optimizer's states in between what the first has left.
        states = []
        for _ in range(1 if ledger.heap is None else 2):
            for _ in range(min(batch.backwards, 2)):
                _backward(topology, sequences, config, paper)
                ledger.kind = GRADIENTS
                gradients.collect()
                ledger.kind = ACTIVATIONS
            if ledger.heap is not None:
                ledger.kind = OPTIMIZER
                states = states or [torch.zeros_like(each) for each in improved for _ in range(2)]
                ledger.kind = ACTIVATIONS
            gradients.forget()
        del states
    for each in hooks:
        each.remove()
    gradients.forget()
    return Phase("RL update", ledger.peak)


def _backward(topology: PolicyOnly, sequences: Sequences, config: Config, paper: Paper) -> None:
    """As `Updater.backward` has it for a microbatch."""
    trainer = config.trainer_config
    evaluation = topology.evaluate(sequences, with_entropy=trainer.entropy_coef > 0, seam=True)
    zeros = torch.zeros_like(evaluation.logprobs)
    losses = [policy_loss(evaluation.logprobs, zeros, zeros, trainer.cliprange).sum()]
    if evaluation.entropy is not None:
        losses[0] = losses[0] - trainer.entropy_coef * evaluation.entropy.sum()
    if evaluation.values is not None:
        losses.append(value_loss(evaluation.values, zeros, zeros, trainer.cliprange_value).sum())
    if evaluation.seam is not None:
        losses[0].backward()
        side_by_side(evaluation.seam.backward, losses[1].backward, torch.device("meta"))
    elif topology.critic_is_apart:
        side_by_side(losses[0].backward, losses[1].backward, torch.device("meta"))
    else:
        sum(losses).backward()


def replace_states(sequences: Sequences, states: Tensor | None) -> Sequences:
    """The same with what a frozen trunk made of them."""
    sequences.trunk_states = states
    return sequences


def dealt_out(phase: Phase, sharding: Sharding, trained: int) -> Phase:
    """What is trained is dealt out; a policy is whole while it samples, and what is frozen always."""
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
