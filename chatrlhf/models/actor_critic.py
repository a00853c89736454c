"""What PPO trains: a policy and, where the algorithm needs one, a value function, behind one call.

The scorer and the update ask for `evaluate`; whether values come from a critic of their own, from a head on
the policy's trunk, or not at all, is decided here once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.kernels.packing import supports_packing
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.loading.lora import backbone_with_adapters
from chatrlhf.models.reference import Reference, reference_of
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import (
    Sequences,
    head_is_plain,
    response_logits,
    response_logprobs,
    response_states,
)
from chatrlhf.models.sequences_seq2seq import sequences_for
from chatrlhf.runtime.cpu_parallel import run_in_parallel


@dataclass
class Evaluation:
    """An actor-critic's view of given responses; every field [B, R] float32, 0 where masked."""

    logprobs: Tensor
    values: Tensor | None
    entropy: Tensor | None
    detach_point: DetachPoint | None = None  # where the log-probabilities' backward stops


class DetachPoint:
    """A place between a policy's trunk and its head at which a backward stops, to be taken up again.

    The trunk's can run beside a critic's then (`cpu_parallel.py`). The head, over a whole vocabulary, has no
    counterpart in a critic, whose core would be left without work.
    """

    def __init__(self, below: Tensor) -> None:
        self.below = below
        self.above = below.detach().requires_grad_(below.requires_grad)

    def backward(self) -> None:
        """Go on below with the gradient that has come to a stop here."""
        if self.above.grad is not None:
            self.below.backward(self.above.grad)


@dataclass
class Part:
    """Trained modules whose gradients never meet those of another part: what an engine of its own can train."""

    modules: list[nn.Module]
    evaluate: Callable[[Sequences, bool], dict[str, Tensor]]  # some of `Evaluation`'s fields


class ActorCritic(nn.Module):
    """What PPO trains: a policy, and in a subclass where its values come from."""

    def __init__(self, policy: nn.Module, distribution: SamplingDistribution) -> None:
        super().__init__()
        self.policy, self.distribution = policy, distribution
        # Dropout would make the ratio of a fresh policy differ from 1. No mode is ever switched back.
        self.eval()

    def evaluate(self, sequences: Sequences, with_entropy: bool = False, detach_point: bool = False) -> Evaluation:
        """Log-probabilities of the sampled tokens, values before each, and entropies where asked for.

        Args:
            detach_point: the caller accepts a backward in two parts; an actor-critic gives one where that is of use.
        """
        logits = response_logits(self.policy, sequences)
        logprobs, entropy = response_logprobs(logits, sequences, self.distribution, with_entropy)
        return Evaluation(logprobs, None, entropy)

    def sequences(self, *parts: Tensor | None) -> Sequences:
        """Prompts and responses as the policy reads them; arguments as of `join`."""
        return sequences_for(self.policy.config)(*parts)

    def trunk_states(self, sequences: Sequences) -> Tensor | None:
        """What every later evaluation of these sequences may start from, [B, T, d]; None where that is the ids."""
        return None

    def reference(self) -> Reference:
        """The policy as it is now, frozen."""
        return reference_of(self.policy, self.distribution)

    def backbones(self) -> list[nn.Module]:
        """The transformers models in it: what may be computed in bfloat16, as a value head may not."""
        return [self.policy]

    @property
    def supports_packing(self) -> bool:
        """Whether rows cost their own tokens and no padding, in all of the models."""
        return all(supports_packing(backbone.base_model) for backbone in self.backbones())

    @property
    def critic_is_apart(self) -> bool:
        """Whether values have no trained weight in common with the policy: their gradients never meet."""
        return False

    def parts(self) -> list[Part]:
        """Everything that is trained, for engines that have to be asked for a forward (`sharding`)."""

        def evaluate(sequences: Sequences, with_entropy: bool) -> dict[str, Tensor]:
            found = vars(self.evaluate(sequences, with_entropy))
            return {name: value for name, value in found.items() if value is not None}

        return [Part([self], evaluate)]

    def value_function(self) -> tuple[nn.Module, ScalarHead] | None:
        """The backbone that values are read from and the head on it, None without a critic."""
        return None

    def parameter_groups(self, actor_lr: float, critic_lr: float) -> list[dict[str, Any]]:
        """Parameters with the learning rate each is trained at."""
        return [{"params": _trainable(self.policy), "lr": actor_lr}]


class PolicyOnly(ActorCritic):
    """A policy without a value function (RLOO, GRPO)."""


class SeparateCritic(ActorCritic):
    """A critic with a backbone of its own."""

    def __init__(
        self, policy: nn.Module, critic: nn.Module, value_head: ScalarHead, distribution: SamplingDistribution
    ) -> None:
        super().__init__(policy, distribution)
        self.critic, self.value_head = critic, value_head
        self.eval()

    def values(self, sequences: Sequences) -> Tensor:
        """V before each response token, [B, R]."""
        return sequences.spread(self.value_head(response_states(self.critic, sequences)))

    def evaluate(self, sequences: Sequences, with_entropy: bool = False, detach_point: bool = False) -> Evaluation:
        def values() -> Tensor:
            return self.values(sequences)

        device = sequences.input_ids.device
        if not head_is_plain(self.policy):
            evaluation, evaluation.values = run_in_parallel(
                lambda: ActorCritic.evaluate(self, sequences, with_entropy), values, device
            )
            return evaluation
        states, read = run_in_parallel(lambda: response_states(backbone_of(self.policy), sequences), values, device)
        stop = DetachPoint(states) if detach_point else None
        logits = response_logits(self.policy, sequences, stop.above if stop else states)
        logprobs, entropy = response_logprobs(logits, sequences, self.distribution, with_entropy)
        return Evaluation(logprobs, read, entropy, stop)

    @property
    def critic_is_apart(self) -> bool:
        return True

    def parts(self) -> list[Part]:
        def policy(sequences: Sequences, with_entropy: bool) -> dict[str, Tensor]:
            logits = response_logits(self.policy, sequences)
            logprobs, entropy = response_logprobs(logits, sequences, self.distribution, with_entropy)
            return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})

        def critic(sequences: Sequences, with_entropy: bool) -> dict[str, Tensor]:
            return {"values": self.values(sequences)}

        return [Part([self.policy], policy), Part([self.critic, self.value_head], critic)]

    def backbones(self) -> list[nn.Module]:
        return [self.policy, self.critic]

    def value_function(self) -> tuple[nn.Module, ScalarHead] | None:
        return self.critic, self.value_head

    def parameter_groups(self, actor_lr: float, critic_lr: float) -> list[dict[str, Any]]:
        critic = [*_trainable(self.critic), *_trainable(self.value_head)]
        return [*super().parameter_groups(actor_lr, critic_lr), {"params": critic, "lr": critic_lr}]


class SharedTrunk(ActorCritic):
    """A value head on the policy's own last hidden states; one forward gives both."""

    def __init__(self, policy: nn.Module, value_head: ScalarHead, distribution: SamplingDistribution) -> None:
        super().__init__(policy, distribution)
        self.value_head = value_head
        self.eval()

    def evaluate(self, sequences: Sequences, with_entropy: bool = False, detach_point: bool = False) -> Evaluation:
        states = response_states(backbone_of(self.policy), sequences)
        # Where the head is not plain, the model is run whole a second time: correct first.
        reusable = states if head_is_plain(self.policy) else None
        logits = response_logits(self.policy, sequences, reusable)
        logprobs, entropy = response_logprobs(logits, sequences, self.distribution, with_entropy)
        return Evaluation(logprobs, sequences.spread(self.value_head(states)), entropy)

    def value_function(self) -> tuple[nn.Module, ScalarHead] | None:
        return backbone_with_adapters(self.policy), self.value_head

    def parameter_groups(self, actor_lr: float, critic_lr: float) -> list[dict[str, Any]]:
        groups = super().parameter_groups(actor_lr, critic_lr)
        return [*groups, {"params": _trainable(self.value_head), "lr": critic_lr}]


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
