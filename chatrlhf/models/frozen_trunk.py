"""A policy of which only the top blocks are trained: what lies below runs once a rollout.

The frozen part, the trunk, is one set of weights for policy, reference and a critic that is a copy of the policy.
The hidden states that leave it never change while a rollout is learned from, so they are captured once, when the
rollout is scored, and the reference, the values and every epoch of the update start from them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from chatrlhf.compat import replaced_modules
from chatrlhf.errors import ConfigError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic, Evaluation
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.models.sequences import Sequences, head_is_plain, laid_out
from chatrlhf.models.weight_sharing import copy_sharing_frozen

KEY = "trainer_config.num_layers_unfrozen"


class SplitModel:
    """A causal transformers model cut in front of its top blocks.

    No family has code of its own here. For the time of a forward the blocks of one side are replaced by stand-ins
    that pass their input on; so embeddings, masks, positions and the numbering of the blocks (by which Gemma 2
    alternates its attention) stay the model's own. Whether the two sides together are the model is tried once.
    """

    def __init__(self, model: nn.Module, unfrozen: int) -> None:
        self.model, self.backbone = model, model.base_model
        self.blocks = _blocks(self.backbone)
        refuse_more_than(unfrozen, len(self.blocks))
        kind = type(self.backbone).__name__
        self.first = len(self.blocks) - unfrozen
        self.entry = _InjectHidden(self.blocks[self.first])
        self.tap = _CaptureInput(self.blocks[self.first])
        whole = list(self.blocks)
        below, above = whole[: self.first], whole[self.first + 1 :]
        self.upper = _named([*map(_PassThrough, below), self.entry, *above])
        self.lower = _named([*below, self.tap, *map(_PassThrough, above)])
        if not self._is_exact():
            raise ConfigError(
                f"{KEY}: {unfrozen} is not supported for a {model.config.model_type}: its top blocks ({kind}) need "
                "more than the hidden states that enter them; set it to -1"
            )

    def freeze(self) -> None:
        """Leave to be trained what lies above the cut: the top blocks, the final norm and a head of its own.

        A head tied to the embeddings stays frozen with them, as in trlX: the embeddings are the trunk's first layer.
        What lies above is what a gradient reaches that starts from captured states, whatever a family calls it.
        """
        with torch.enable_grad(), _evaluating(self.model):
            ids = _probe(self.model)
            with self.entering(self.states(ids)):
                logits = self.model(input_ids=ids, use_cache=False).logits
            trainable = [each for each in self.model.parameters() if each.requires_grad]
            reached = torch.autograd.grad(logits.float().square().sum(), trainable, allow_unused=True)
        above = {id(each) for each, gradient in zip(trainable, reached, strict=True) if gradient is not None}
        # A block's experts may all be idle on so few tokens.
        above |= {id(each) for block in list(self.blocks)[self.first :] for each in block.parameters()}
        above -= {id(each) for each in self.model.get_input_embeddings().parameters()}
        for each in trainable:
            each.requires_grad_(id(each) in above)

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> Tensor:
        """What enters the first trained block, [B, T, d] in the model's precision, for ids [B, T]."""
        with replaced_modules(self.blocks, self.lower):
            self.backbone(input_ids=input_ids, use_cache=False)
        states, self.tap.seen = self.tap.seen, None
        return states

    @contextmanager
    def entering(self, states: Tensor) -> Iterator[None]:
        """Inside, a forward of the model starts from these states; its ids only say how many there are."""
        self.entry.states = states
        try:
            with replaced_modules(self.blocks, self.upper):
                yield
        finally:
            self.entry.states = None

    @torch.no_grad()
    def _is_exact(self) -> bool:
        with _evaluating(self.model):
            returned: list[Any] = []
            hook = self.blocks[self.first].register_forward_hook(lambda _, inputs, output: returned.append(output))
            ids = _probe(self.model)
            whole = self.backbone(input_ids=ids, use_cache=False).last_hidden_state.float()
            hook.remove()
            for stand_in in (*self.upper.values(), *self.lower.values()):
                if isinstance(stand_in, _PassThrough):
                    stand_in.returns = len(returned[0]) if isinstance(returned[0], tuple) else 0
            states = self.states(ids)
            with self.entering(states):
                cut = self.backbone(input_ids=ids, use_cache=False).last_hidden_state.float()
        return torch.allclose(cut, whole, rtol=1e-4, atol=1e-5)


class FrozenTrunk(ActorCritic):
    """Another actor-critic, evaluated from captured states.

    Its critic takes part where it stands on the same frozen blocks: as a head on the policy, or as a copy of it. One
    with blocks of its own (a reward model) reads the ids.
    """

    def __init__(self, inner: ActorCritic, unfrozen: int) -> None:
        nn.Module.__init__(self)
        self.inner = inner
        self.unfrozen = unfrozen
        head_is_plain(inner.policy)  # answered while the model is whole
        own, *others = (
            SplitModel(each, unfrozen) for each in inner.backbones() if _on_trunk(each, inner.policy, unfrozen)
        )
        self.cuts = [own, *others]

    @property
    def policy(self) -> nn.Module:
        return self.inner.policy

    @property
    def distribution(self) -> SamplingDistribution:
        return self.inner.distribution

    def trunk_states(self, sequences: Sequences) -> Tensor:
        return self.cuts[0].states(sequences.input_ids)

    def evaluate(self, sequences: Sequences, with_entropy: bool = False, detach_point: bool = False) -> Evaluation:
        states = sequences.trunk_states
        if states is None:
            states = self.trunk_states(sequences)
        with ExitStack() as stack:
            for cut in self.cuts:
                stack.enter_context(cut.entering(laid_out(states, cut.backbone, sequences)))
            return self.inner.evaluate(sequences, with_entropy, detach_point)

    def reference(self) -> Reference:
        return BranchReference(self.policy, self.distribution, self.unfrozen)

    def backbones(self) -> list[nn.Module]:
        return self.inner.backbones()

    @property
    def critic_is_apart(self) -> bool:
        return self.inner.critic_is_apart

    def value_function(self) -> tuple[nn.Module, ScalarHead] | None:
        return self.inner.value_function()

    def parameter_groups(self, actor_lr: float, critic_lr: float) -> list[dict[str, Any]]:
        return self.inner.parameter_groups(actor_lr, critic_lr)


class BranchReference(Reference):
    """The reference of a policy with a frozen trunk: a copy of what is trained, on the trunk's own weights."""

    def __init__(self, policy: nn.Module, distribution: SamplingDistribution, unfrozen: int) -> None:
        head_is_plain(policy)
        super().__init__(copy_sharing_frozen(policy), distribution)
        self.cut = SplitModel(self.model, unfrozen)

    @torch.no_grad()
    def logprobs(self, sequences: Sequences) -> Tensor:
        states = sequences.trunk_states
        if states is None:
            states = self.cut.states(sequences.input_ids)
        with self.cut.entering(laid_out(states, self.cut.backbone, sequences)):
            return super().logprobs(sequences)


def freeze_trunk(policy: nn.Module, unfrozen: int) -> None:
    """Leave only a policy's top blocks trainable; before a critic is copied from it, so that both share the rest."""
    SplitModel(policy, unfrozen).freeze()


def refuse_more_than(unfrozen: int, blocks: int) -> None:
    """A ConfigError where more blocks are to be trained than there are."""
    if unfrozen > blocks:
        raise ConfigError(
            f"{KEY}: {unfrozen} is more than the {blocks} blocks of the actor; set it to at most {blocks}, "
            "or to -1 to train all of the model"
        )


class _PassThrough(nn.Module):
    """Stands in for a block and passes its input on; ``returns`` is the length of the tuple the block gives, or 0."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.original = (block,)  # in a tuple: its weights are not this module's
        self.returns = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states = _entering(args, kwargs)
        return (states, *[None] * (self.returns - 1)) if self.returns else states

    def __getattr__(self, name: str) -> Any:
        """Models ask their blocks for more than a forward, such as the kind of their attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"][0], name)


class _CaptureInput(_PassThrough):
    """Keeps what would have entered the block."""

    seen: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = _entering(args, kwargs)
        return super().forward(*args, **kwargs)


class _InjectHidden(_PassThrough):
    """The block itself, given captured states instead of its input."""

    states: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.original[0](self.states, *args[1:], **kwargs)
        return self.original[0](**kwargs | {"hidden_states": self.states})


def _entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _named(blocks: list[nn.Module]) -> dict[str, nn.Module]:
    return {str(i): block for i, block in enumerate(blocks)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _probe(model: nn.Module) -> Tensor:
    return torch.arange(1, 7, device=next(model.parameters()).device)[None]


def _blocks(backbone: nn.Module) -> nn.ModuleList:
    """The list of a model's blocks: the outermost that is as long as its configuration says."""
    number = backbone.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in backbone.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not lists:
        kind = backbone.config.model_type
        raise ConfigError(f"{KEY}: no list of {number} blocks was found in a {kind}; set it to -1")
    return min(lists, key=lambda found: found[0].count("."))[1]


def _on_trunk(model: nn.Module, policy: nn.Module, unfrozen: int) -> bool:
    """Whether a model's lower blocks and embeddings are the policy's own."""
    if model is policy:
        return True
    frozen = {id(each) for each in policy.parameters() if not each.requires_grad}
    blocks = list(_blocks(model.base_model))
    below = [model.get_input_embeddings(), *blocks[: max(len(blocks) - unfrozen, 0)]]
    return all(id(each) in frozen for module in below for each in module.parameters())
