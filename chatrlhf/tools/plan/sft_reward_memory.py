"""The memory of one device in each phase of the ACTOR and REWARD stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from chatrlhf.config.schema import ActorConfig, RewardConfig
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.loading.lora import is_adapter
from chatrlhf.tools.plan.fake_run import ACTIVATIONS, GRADIENTS, IDLE, MemoryTracker
from chatrlhf.tools.plan.flops import Dimensions
from chatrlhf.tools.plan.meta_models import Models
from chatrlhf.tools.plan.quantized_linear import QuantizedLinear
from chatrlhf.tools.plan.zero_memory import Sharding

WEIGHTS, OPTIMIZER = "weights", "optimizer"


@dataclass(frozen=True)
class Phase:
    """What is in a device's memory where a phase needs the most."""

    name: str
    parts: dict[str, int]  # bytes, by what they are
    host: int = 0  # bytes in the CPU's memory that were moved there from the device

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Batch:
    """What a device gets at once."""

    rows: int
    tokens: int  # of the longest row; of an encoder–decoder, of the longest prompt
    backwards: int = 1  # of an optimizer step
    held_out: int = 0  # rows that are read at once where held-out rows are judged; 0: there are none
    reply: int | None = None  # tokens of the longest reply, which a decoder reads

    @property
    def padded(self) -> bool:
        """Rows side by side are hardly ever of one length."""
        return self.rows > 1


@dataclass
class StagePlan:
    """A stage's model and phases."""

    parameters: int
    trained: int
    phases: list[Phase]
    dimensions: Dimensions
    in_bf16: bool = False  # what products are computed in
    beside: dict[str, Dimensions] = field(default_factory=dict)  # of other models that read all rows, by name


def actor_stage(models: Models, batch: Batch, sharding: Sharding, name: str = "ACTOR") -> StagePlan:
    """Supervised fine-tuning, or training on plain text."""
    from chatrlhf.stages.sft import microbatch_loss

    config = models.config.actor_config
    model = models.actor()
    counts = numbers(model)
    model.train()
    loss = microbatch_loss(model, config)

    def of_rows(rows: int) -> Tensor:
        ids = torch.zeros(rows, batch.tokens, dtype=torch.long)
        labels = ids if batch.reply is None else torch.zeros(rows, batch.reply, dtype=torch.long)
        return loss(ids, torch.ones_like(ids), labels)

    phases = _phases(name, model, of_rows, config, batch, sharding, models)
    return StagePlan(*counts, phases, dimensions(model), models.in_bf16(config.precision))


def reward_stage(models: Models, batch: Batch, sharding: Sharding, pairs: bool) -> StagePlan:
    """Training of a reward model; a pair is two rows."""
    from trl.trainer.utils import disable_dropout_in_model

    config = models.config.reward_config
    model = models.reward_model()
    counts = numbers(model)
    model.train()
    if config.gradient_checkpointing:
        model.backbone.gradient_checkpointing_enable({"use_reentrant": False})
        if config.peft_enable:
            model.backbone.enable_input_require_grads()
    disable_dropout_in_model(model)

    def of_rows(rows: int) -> Tensor:
        ids = torch.zeros(rows * (1 + pairs), batch.tokens, dtype=torch.long)
        scores = scores_of(model, ids)
        return -nn.functional.logsigmoid(scores[:rows] - scores[-rows:]).mean()

    phases = _phases("REWARD", model, of_rows, config, batch, sharding, models)
    return StagePlan(*counts, phases, dimensions(model), models.in_bf16(config.precision))


def scores_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Of a reward model, [B], for rows of one length."""
    if model.pooling == "last":
        return model.head(model.backbone(input_ids=ids).last_hidden_state[:, -1])
    return model(ids, torch.ones_like(ids)).logits[:, 0]


def _phases(
    stage: str,
    model: nn.Module,
    loss: Callable[[int], Tensor],
    config: ActorConfig | RewardConfig,
    batch: Batch,
    sharding: Sharding,
    models: Models,
) -> list[Phase]:
    fake_device, autocast = models.fake_device, models.in_bf16(config.precision)
    if sharding.low and autocast:  # DeepSpeed has the model itself in 16 bit
        with fake_device.fake:
            for each in model.parameters():
                if each.is_floating_point():
                    each.data = each.data.bfloat16()
        autocast = False
    trained = [each for each in model.parameters() if each.requires_grad]
    tracker = fake_device.tracker()
    tracker.track(model.parameters(), WEIGHTS)
    tracker.track(model.buffers(), WEIGHTS)
    _file_gradients(tracker, trained, sharding)
    with fake_device.tracking(tracker, autocast, batch.padded):
        # A second step finds the optimizer's states in between what the first has left.
        states = []
        for _ in range(1 if tracker.heap is None else 2):
            for _ in range(min(batch.backwards, 2)):
                loss(batch.rows).backward()
            if tracker.heap is not None:
                tracker.kind = OPTIMIZER
                states = states or [torch.zeros_like(each) for each in trained for _ in range(2)]
                tracker.kind = ACTIVATIONS
                for each in trained:
                    each.grad = None
        del states
    phases = [_dealt_out(f"{stage} step", tracker.peak, model, trained, sharding)]
    if batch.held_out:
        tracker = fake_device.tracker()
        tracker.track(model.parameters(), WEIGHTS)
        tracker.track(model.buffers(), WEIGHTS)
        model.eval()
        with torch.no_grad(), fake_device.tracking(tracker, autocast, batch.padded):
            loss(batch.held_out)
        phases.append(_dealt_out(f"{stage} held-out rows", tracker.peak, model, trained, sharding))
    return phases


def _file_gradients(tracker: MemoryTracker, trained: list[nn.Parameter], sharding: Sharding) -> None:
    """Have each gradient named as one; where they are sharded, only its part stays."""

    def arrived(parameter: nn.Parameter) -> None:
        tracker.rename(parameter.grad, GRADIENTS)
        if sharding.stage >= 2:
            tracker.add(sharding.gradient(parameter.grad.nbytes), GRADIENTS)
            parameter.grad = None

    for each in trained:
        each.register_post_accumulate_grad_hook(arrived)


def _dealt_out(
    name: str, peak: dict[str, int], model: nn.Module, trained: list[nn.Parameter], sharding: Sharding
) -> Phase:
    size, numel = sum(each.nbytes for each in trained), sum(each.numel() for each in trained)
    states, states_on_host = sharding.optimizer(numel, size)
    weights, weights_on_host = sharding.weights(peak[WEIGHTS], sum(each.numel() for each in model.parameters()))
    gradients = peak.get(GRADIENTS, 0)
    if sharding.engine != "none" and gradients:
        gradients += sharding.in_transit(size, numel)
    parts = {name: size for name, size in peak.items() if name in (ACTIVATIONS, IDLE)}
    parts |= {WEIGHTS: weights, OPTIMIZER: states, GRADIENTS: gradients}
    return Phase(name, {part: size for part, size in parts.items() if size}, states_on_host + weights_on_host)


def numbers(model: nn.Module) -> tuple[int, int]:
    """(parameters, those that are trained); of quantized layers the weights they stand for."""
    total = sum(each.numel() for each in model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            total += module.in_features * module.out_features - module.weight.numel()
    return total, sum(each.numel() for each in model.parameters() if each.requires_grad)


def dimensions(model: nn.Module) -> Dimensions:
    """Of a model with a head or without, or of a reward model."""
    backbone = getattr(model, "backbone", model)
    encoder = products(backbone.get_encoder()) if is_encoder_decoder(backbone.config) else 0
    return Dimensions.of(products(model), backbone.config, encoder)


def products(model: nn.Module) -> int:
    """N of the bound: weights in matrix products, the embeddings and what is tied to them left out.

    Of experts those count that read a token.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    total = 0
    for name, module in model.named_modules():
        if module is head or is_adapter(name):
            continue
        if isinstance(module, QuantizedLinear):
            total += module.in_features * module.out_features
        elif isinstance(module, (nn.Linear, Conv1D)):
            total += module.weight.numel()
        elif type(module).__name__.endswith("Experts"):
            stacked = [each for each in module.parameters(recurse=False) if each.dim() == 3]
            text = model.config.get_text_config()
            total += sum(each.numel() // len(each) for each in stacked) * text.num_experts_per_tok
    return total
