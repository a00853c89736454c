"""Fine-tuning an encoder–decoder on transformers' Trainer, which TRL's SFTTrainer has no counterpart for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook

from chatrlhf.config.schema import ActorConfig
from chatrlhf.data.collate import pad_right
from chatrlhf.data.encoder import IGNORED
from chatrlhf.models.loading.backbone import decoder_start
from chatrlhf.models.sequences_seq2seq import shifted
from chatrlhf.stages.global_batches import GlobalBatches

NOISE = "neftune_noise_alpha"


class Seq2SeqTrainer(GlobalBatches, Trainer):
    """Prompts to the encoder, and the loss on the decoder's replies."""

    def __init__(self, model: nn.Module, arguments: dict[str, Any], processing_class: Any, **rest: Any) -> None:
        """
        Args:
            arguments: as SFTTrainer's configuration takes them.
            processing_class: the tokenizer.
            rest: as `GlobalBatches` and transformers' Trainer take it.
        """
        arguments = {name: value for name, value in arguments.items() if name != "max_length"}  # rows fit already
        smoothing, self.noise = arguments.pop("label_smoothing_factor"), arguments.pop(NOISE)
        super().__init__(
            model=model,
            args=TrainingArguments(**arguments),
            data_collator=PairCollator(processing_class.pad_token_id, decoder_start(model.config)),
            compute_loss_func=partial(reply_loss, smoothing=smoothing),
            processing_class=processing_class,
            **rest,
        )
        # T5 takes the number of labels among any keywords and forgets it.
        self.model_accepts_loss_kwargs = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        with noise_on_embeddings(self.model, self.noise):
            return super().train(*args, **kwargs)


class PairCollator:
    """Prompts and labels, right-padded each, and what the decoder reads: the labels behind its start token."""

    def __init__(self, pad_id: int, start: int) -> None:
        self.pad_id, self.start = pad_id, start

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_id)
        replies, real = pad_right([row["labels"] for row in rows], self.pad_id)
        return {
            "input_ids": ids,
            "attention_mask": mask.long(),
            "decoder_input_ids": shifted(replies, self.start),
            "labels": replies.masked_fill(~real, IGNORED),
        }


def reply_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None, smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy in nats a label, over all labels of an optimizer step where their number is given.

    Args:
        outputs: of the model; logits [B, R, V].
        labels: [B, R] int64; `IGNORED` takes no part.
        smoothing: share of each label that is spread over the vocabulary.
    """
    total = nn.functional.cross_entropy(
        outputs.logits.float().flatten(0, 1),
        labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="sum",
    )
    if num_items_in_batch is None:
        num_items_in_batch = (labels != IGNORED).sum()
    return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


def microbatch_loss(model: nn.Module, config: ActorConfig) -> Callable[..., Tensor]:
    """What `Seq2SeqTrainer` computes of a microbatch, for a plan; the model is changed as the trainer changes it.

    Returns:
        From input_ids and attention_mask, [B, P] each, and labels, [B, R], to the loss.
    """
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.peft_enable:
            model.enable_input_require_grads()

    def loss(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        read = shifted(labels, decoder_start(model.config))
        with noise_on_embeddings(model, config.neftune_noise_alpha):
            outputs = model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=read)
        return reply_loss(outputs, labels, labels.numel(), config.label_smoothing_factor)

    return loss


@contextmanager
def noise_on_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """NEFTune (Jain et al. 2023) on what encoder and decoder read.

    The Trainer's own would hook the embedding that both share the weights of, which is itself never called.
    """
    sides = () if alpha is None else (model.get_encoder(), model.get_decoder())
    embeddings = {id(each): each for each in (side.get_input_embeddings() for side in sides)}.values()
    for each in embeddings:
        setattr(each, NOISE, alpha)
    hooks = [each.register_forward_hook(neftune_post_forward_hook) for each in embeddings]
    try:
        yield
    finally:
        for each, hook in zip(embeddings, hooks, strict=True):
            hook.remove()
            delattr(each, NOISE)
