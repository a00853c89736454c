"""The memory of one device in each phase of the RL stage: rollout, scoring, update."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from chatrlhf.assembly import DEFAULT_NEW_TOKENS
from chatrlhf.config.load import load_peft_config
from chatrlhf.config.quantization import QuantizationKeys
from chatrlhf.config.schema import Config
from chatrlhf.errors import ConfigError
from chatrlhf.functional.logprobs import SamplingDistribution, sample_by_inversion
from chatrlhf.functional.losses import policy_loss, value_loss
from chatrlhf.generation.cache import make_cache
from chatrlhf.lanes import side_by_side
from chatrlhf.models.adapters import has_adapters
from chatrlhf.models.attention import prefer_fast_attention
from chatrlhf.models.critics import ALL_BLOCKS
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.gate import prefer_lean_gates
from chatrlhf.models.norm import prefer_fast_norms
from chatrlhf.models.recomputation import recompute_activations
from chatrlhf.models.reference import Reference
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, join
from chatrlhf.models.sharing import sharing_copy
from chatrlhf.models.topology import PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.planning.models import Models
from chatrlhf.planning.paper import ACTIVATIONS, GRADIENTS, Ledger, Paper
from chatrlhf.planning.sharding import Sharding
from chatrlhf.planning.steps import OPTIMIZER, Phase, StagePlan, numbers, products, scores_of
from chatrlhf.rl.experience import ALGORITHMS
from chatrlhf.rl.gradients import Gradients
from chatrlhf.rl.master_weights import MasterWeights, to_bfloat16

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


def rl_stage(models: Models, batch: RolloutBatch, sharding: Sharding, has_function: bool) -> StagePlan:
    """PPO, RLOO or GRPO.

    Args:
        has_function: a function gives the reward, and there is no reward model.

    Raises:
        ConfigError: the policy is one that the plan cannot lay out.
    """
    config, paper = models.config, models.paper
    trainer = config.trainer_config
    policy = models.policy()
    reward = None if has_function else _reward(models, policy)
    if policy.config.is_encoder_decoder:
        raise ConfigError(f"actor_config.model: there is no plan for the RL stage of a {policy.config.model_type} yet")
    critic = _critic(models, policy, reward)
    with paper.computing(Ledger()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # torch itself, where it copies
        topology = _topology(config, policy, critic)
        reference = topology.reference()
        for each in (*topology.backbones(), reference.model):
            each.base_model._chatrlhf_packs = False  # rows of one length go side by side
        frozen = [reference.model] + ([reward.backbone] if reward else [])
        # Where weights are dealt out, models lie in the CPU's memory by then.
        prepared = [] if sharding.stage == 3 else _preparation(topology, frozen, models)
        masters = _made_ready(topology, frozen, models)
    named = [(POLICY, topology.policy), (CRITIC, topology), (REFERENCE, reference.model)]
    named += [(REWARD, reward)] if reward else []
    resident = [(name, list(module.parameters())) for name, module in named]
    resident += [(MASTERS, list(masters))] if masters else []
    groups = topology.parameter_groups(trainer.actor_lr, trainer.critic_lr)
    if masters is not None:
        groups = masters.groups(groups)
    improved = [each for group in groups for each in group["params"]]
    phases = [
        *prepared,
        _rollout(topology, resident, batch, paper),
        _scoring(topology, reference, reward, _sequences(batch.scored, batch, paper), resident, batch, paper),
        _update(topology, groups, masters, resident, batch, paper, config),
    ]
    trained = sum(each.numel() for each in improved)
    apart = 0 if topology.value_function() is None else products(topology.value_function()[0])
    return StagePlan(
        parameters=numbers(topology.policy)[0],
        trained=trained,
        phases=[_dealt_out(each, sharding, trained) for each in phases],
        products=products(topology.policy),
        settings=topology.policy.config,
        beside={CRITIC: apart if topology.critic_is_apart else 0, REWARD: products(reward) if reward else 0},
        in_bf16=masters is not None,
    )


def _topology(config: Config, policy: nn.Module, critic: tuple[nn.Module | None, ScalarHead] | None) -> PolicyOnly:
    """What `make_topology` gives, without tokenizers.

    Args:
        critic: its backbone, None where that is the policy's or shares its frozen blocks, and its head; None without.
    """
    trainer = config.trainer_config
    distribution = SamplingDistribution(trainer.gen_kwargs.temperature or config.actor_config.temperature or 1.0, (0,))
    unfrozen = trainer.num_layers_unfrozen
    if unfrozen != ALL_BLOCKS:
        freeze_trunk(policy, unfrozen)
    if critic is None:
        made = PolicyOnly(policy, distribution)
    elif config.critic_config.model == "shared":
        made = SharedTrunk(policy, critic[1], distribution)
    else:
        backbone, head = critic
        made = SeparateCritic(policy, backbone or sharing_copy(policy.base_model), head, distribution)
    return made if unfrozen == ALL_BLOCKS else FrozenTrunk(made, unfrozen)


def _reward(models: Models, policy: nn.Module) -> RewardModel:
    """The trained reward model; by adapters upon the policy's weights where it was made of the same ones."""
    config, reward = models.config, models.config.reward_config
    same = reward.model in ("actor", config.actor_config.model)
    bits = [(each.load_in_4bit, each.load_in_8bit) for each in (reward, config.actor_config)]
    if not (same and reward.peft_enable and config.actor_config.peft_enable and bits[0] == bits[1]):
        return models.reward_model().requires_grad_(False).eval()
    adapters = load_peft_config(config, "reward_config")
    backbone = models.upon(policy.base_model, adapters, reward)
    head = models.head(backbone, reward.model_head_hidden_size)
    return RewardModel(backbone, head, "last").requires_grad_(False).eval()


def _critic(
    models: Models, policy: nn.Module, reward: RewardModel | None
) -> tuple[nn.Module | None, ScalarHead] | None:
    """The critic's backbone, where it shares no trained weight with a copy of the policy, and its head."""
    config, named = models.config.critic_config, models.config.critic_config.model
    if not ALGORITHMS[models.config.trainer_config.algorithm].needs_critic:
        return None
    if named == "shared":
        return None, models.head(policy, config.model_head_hidden_size)
    mlp_size, start, keys = config.model_head_hidden_size, policy.base_model, models.config.actor_config
    if named not in (None, models.config.reward_config.model):
        start, keys = models.backbone(named, "critic_config.model"), QuantizationKeys()
    elif reward is not None and reward.pooling == "last" and _alike(reward.backbone, policy):
        start, keys = reward.backbone, models.config.reward_config
        mlp_size = models.config.reward_config.model_head_hidden_size
    head = models.head(start, mlp_size)
    if config.peft_enable:
        return models.upon(start, load_peft_config(models.config, "critic_config"), keys), head
    if start is policy.base_model and not has_adapters(policy):
        return None, head
    return models.like(start), head


def _alike(backbone: nn.Module, policy: nn.Module) -> bool:
    """Of one kind and, as far as their sizes say, with one tokenizer."""
    first, second = backbone.config.get_text_config(), policy.config.get_text_config()
    return first.model_type == second.model_type and first.vocab_size == second.vocab_size


def _made_ready(topology: PolicyOnly, frozen: list[nn.Module], models: Models) -> MasterWeights | None:
    """As `prepare_models` does, which tries out what it changes; an activation can be tried out here, too."""
    for model in (*topology.backbones(), *frozen):
        if models.config.actor_config.attn_implementation is None:
            prefer_fast_attention(model, models.paper.device)
        prefer_fast_norms(model, models.paper.device)
        if _is_swiglu(model):
            prefer_lean_gates(model, models.paper.device)
    masters = None
    if models.rl_in_bf16():
        masters = MasterWeights(*topology.backbones())
        to_bfloat16(*frozen)
    if models.config.trainer_config.gradient_checkpointing:
        for model in topology.backbones():
            recompute_activations(model, "trainer_config.gradient_checkpointing")
    return masters


def _preparation(topology: PolicyOnly, frozen: list[nn.Module], models: Models) -> list[Phase]:
    """Where RL computes in bfloat16: models come in float32, and a copy of each is made.

    On a GPU they all lie there by then. On a CPU their files are read when they are copied, one after the other.
    """
    if not models.rl_in_bf16():
        return []
    seen: set[int] = set()
    sizes = []  # of each model what is its own: in float32, and what of it stays in float32
    for model in (*topology.backbones(), *frozen):
        own = [each for each in model.parameters() if id(each) not in seen and each.dtype == torch.float32]
        seen.update(map(id, own))
        stays = model in topology.backbones()
        kept = sum(each.nbytes for each in own if stays and (each.requires_grad or not has_adapters(model)))
        sizes.append((sum(each.nbytes for each in own), kept))
    if models.paper.device.type == "cpu":
        most = done = 0
        for whole, kept in sizes:
            most = max(most, done + whole + whole // 2)
            done += whole // 2 + kept
    else:
        most = sum(whole + kept // 2 for whole, kept in sizes)
    return [Phase(PREPARATION, {"models in float32 and bfloat16": most})]


def _is_swiglu(model: nn.Module) -> bool:
    config = model.config.get_text_config()
    return getattr(config, "hidden_act", getattr(config, "hidden_activation", None)) in ("silu", "swish")


def _sequences(rows: int, batch: RolloutBatch, paper: Paper) -> Sequences:
    """Rows of one length, on paper."""
    prompt = torch.zeros(rows, batch.prompt, dtype=torch.long)
    response = torch.zeros(rows, batch.response, dtype=torch.long)
    real = join(prompt, prompt.bool() | True, response, response.bool() | True)
    tokens, slots = real.tokens, real.padded_slots

    def drawn(tensor: Tensor) -> Tensor:
        return paper.fake.from_tensor(tensor)

    names = ("input_ids", "attention_mask", "response_ids", "response_mask", "slots", "positions", "min_new_tokens")
    made = Sequences(*(drawn(getattr(real, name)) for name in names))
    made.__dict__.update(tokens=drawn(tokens), padded_slots=drawn(slots), stream=None)
    return made


def _opened(resident: list[tuple[str, list[Tensor]]], paper: Paper) -> Ledger:
    ledger = paper.ledger(keeps_freed=True)
    for name, tensors in resident:
        ledger.hold(tensors, name)
    return ledger


@torch.no_grad()
def _rollout(topology: PolicyOnly, resident: list, batch: RolloutBatch, paper: Paper) -> Phase:
    """Prompts are read, room is made for the longest response, and one more token is drawn."""
    policy, ledger = topology.policy, _opened(resident, paper)
    with paper.computing(ledger):
        cache = make_cache(policy.config)
        ids = torch.zeros(batch.slots, batch.prompt, dtype=torch.long)
        logits = policy(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        _draw(topology, logits)
        del logits
        for layer in cache.layers:
            for each in (layer.keys, layer.values):
                ledger.rename(each, CACHE)
        for layer in cache.layers:
            rows, heads, _, size = layer.keys.shape
            more = layer.keys.new_zeros(rows, heads, max(batch.response - 1, 1), size)
            layer.update(more, more)
            del more
            for each in (layer.keys, layer.values):
                ledger.rename(each, CACHE)
        width = cache.layers[0].keys.shape[2]
        mask = torch.ones(batch.slots, 1, 1, width, dtype=torch.bool)
        position = torch.full((batch.slots, 1), batch.tokens - 1)
        logits = policy(
            input_ids=ids[:, :1], attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        ).logits[:, -1]
        _draw(topology, logits)
    return Phase(ROLLOUT, ledger.peak)


def _draw(topology: PolicyOnly, logits: Tensor) -> None:
    places = torch.zeros(len(logits), dtype=torch.long)
    adjusted = topology.distribution.adjust(logits, places, places)
    sample_by_inversion(adjusted, torch.zeros(len(logits)))


@torch.no_grad()
def _scoring(
    topology: PolicyOnly,
    reference: Reference,
    reward: RewardModel | None,
    sequences: Sequences,
    resident: list,
    batch: RolloutBatch,
    paper: Paper,
) -> Phase:
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


def _update(
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
    sequences = _sequences(batch.learned, batch, paper)
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


def _dealt_out(phase: Phase, sharding: Sharding, trained: int) -> Phase:
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
