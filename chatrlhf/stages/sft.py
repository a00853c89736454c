"""ACTOR: a language model learns from demonstrations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from chatrlhf.config.schema import ActorConfig
from chatrlhf.data.encoder import IGNORED, Encoder, fitting
from chatrlhf.data.inputs import Rows, corpus
from chatrlhf.data.stage_rows import ActorRow
from chatrlhf.models.for_stages import load_actor, load_base
from chatrlhf.models.loading.adapter_loading import train_on_adapters
from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.model_info import parameter_count, trained_count
from chatrlhf.models.loading.pretrained import leave_router_logits
from chatrlhf.models.loading.quantization import ready_for_adapters
from chatrlhf.models.stop_tokens import vocabulary_rows
from chatrlhf.runtime.checkpoints import StageFiles
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.sharding.accelerate_env import Sharding
from chatrlhf.sharding.launch import sharding_of
from chatrlhf.stages.context import RunContext, policy_encoder, publish_policy, record, require, with_fresh_adapters
from chatrlhf.stages.global_batches import GlobalBatches
from chatrlhf.stages.hf_trainer import StageCallback, common_arguments, run_trainer
from chatrlhf.stages.row_order import EpochOrder, widths

STAGE = "ACTOR"


def train_actor(
    model: nn.Module,
    encoder: Encoder,
    rows: Rows,
    config: ActorConfig,
    files: StageFiles,
    log: RunLog,
    device: torch.device,
    seed: int,
    sharding: Sharding = None,
) -> nn.Module:
    """Fine-tune ``model``, in place unless it is sharded, and return it. Rows beyond the context are dropped.

    Raises:
        DataError: no row fits the context.
        Interrupted, CheckpointError: see `run_trainer`.
    """
    source = config.reads_from("actor_config", "train_dataset_path")
    train, kept = _dataset(rows.train, encoder, config, source, log)
    held_out = _dataset(rows.held_out, encoder, config, "the held-out rows", log)[0] if rows.held_out else None
    lengths = widths(train, "input_ids", "labels") if config.sort_by_length else None
    order = EpochOrder(rows.epochs.only(kept, source), config.batch_size, seed, lengths)
    trainer_class = _paired_trainer() if is_encoder_decoder(model.config) else _causal_trainer()

    def make_trainer(callback: StageCallback, from_the_beginning: bool) -> Any:
        arguments = common_arguments(
            config, "actor_config", files.scratch, len(order), len(rows.held_out), device, seed, sharding
        )
        arguments |= {
            "label_smoothing_factor": config.label_smoothing_factor,
            "neftune_noise_alpha": config.neftune_noise_alpha,
            "eval_on_start": from_the_beginning and held_out is not None,
        }
        return trainer_class(
            model=model,
            arguments=arguments,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=encoder.tokenizer,
            callbacks=[callback],
            order=order,
        )

    trained = run_trainer(make_trainer, model, files, log, config.iteration_per_print, sharding=sharding)
    leave_router_logits(trained.config)
    return trained


def _causal_trainer() -> Any:
    from trl import SFTConfig, SFTTrainer

    class CausalTrainer(GlobalBatches, SFTTrainer):
        def __init__(self, arguments: dict[str, Any], **rest: Any) -> None:
            super().__init__(args=SFTConfig(**arguments, packing=False), **rest)

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card: TRL would write one beside each checkpoint."""

    return CausalTrainer


def _paired_trainer() -> Any:
    from chatrlhf.stages.sft_seq2seq import Seq2SeqTrainer

    return Seq2SeqTrainer


def microbatch_loss(model: nn.Module, config: ActorConfig) -> Callable[..., torch.Tensor]:
    """What the trainer computes of a microbatch, for a plan; the model is changed as the trainer changes it.

    Returns:
        From input_ids, attention_mask and labels, [B, T] each, to the loss; of an encoder–decoder labels are [B, R].
    """
    if is_encoder_decoder(model.config):
        from chatrlhf.stages import sft_seq2seq

        return sft_seq2seq.microbatch_loss(model, config)
    from transformers.integrations.neftune import activate_neftune
    from transformers.trainer_pt_utils import LabelSmoother
    from trl.trainer.utils import add_fused_lm_head

    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if config.peft_enable:
            model.enable_input_require_grads()
    if config.neftune_noise_alpha is not None:
        activate_neftune(model, config.neftune_noise_alpha)
    add_fused_lm_head(
        model.get_base_model() if config.peft_enable else model, outputs=("log_probs", "entropy", "is_top1")
    )
    smoother = LabelSmoother(config.label_smoothing_factor) if config.label_smoothing_factor else None

    def loss(input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if smoother is None:
            return -model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum()
        smoothed = smoother(model(**inputs), labels, shift_labels=True, num_items_in_batch=1)
        with torch.no_grad():
            model(**inputs, labels=labels, fused_lm_head=True)
        return smoothed

    return loss


def _dataset(
    rows: Sequence[ActorRow], encoder: Encoder, config: ActorConfig, source: str, log: RunLog
) -> tuple[Dataset, list[int]]:
    """Rows as ids and labels, and the numbers of those that are within the context."""
    limit = encoder.max_length
    encoded = [encoder.actor_row(row, config.loss_on) for row in rows]
    if config.over_length == "cut":
        long = [i for i, row in enumerate(encoded) if encoder.row_length(*row) > limit]
        for i in long:
            ids, labels = encoder.cut_actor_row(rows[i], config.loss_on)
            if any(label != IGNORED for label in labels):  # where nothing is left to learn it is dropped below
                encoded[i] = ids, labels
        if long:
            log.warn(f"{STAGE}: {len(long)} of {len(rows)} rows of {source} exceed {limit} tokens and are cut")
    kept, dropped = fitting(range(len(encoded)), [encoder.row_length(*row) for row in encoded], limit, source)
    if dropped:
        log.warn(f"{STAGE}: {dropped} of {len(rows)} rows of {source} exceed {limit} tokens and are dropped")
    ids, labels = ([encoded[i][part] for i in kept] for part in (0, 1))
    return Dataset.from_dict({"input_ids": ids, "labels": labels}), kept


def run_actor(ctx: RunContext) -> dict[str, Any]:
    """ACTOR: fine-tune the language model on demonstrations; leaves ``actor/``."""

    config, rows = ctx.config.actor_config, require(ctx.inputs.actor)
    start = ctx.start()
    if start is config and ctx.config.pretrain_config.names_data:
        ctx.log.warn("ACTOR: no pretrained model in this folder, so it starts from actor_config.model as it is")
    ctx.warn_unapplied_scaling(start.model)
    goes_on = config.peft_enable and start is not config and base_of(start.model) is not None
    load = load_base if goes_on else load_actor
    model, tokenizer = load(start, corpus(ctx.config), ctx.device, config.precision)
    encoder = policy_encoder(ctx, "ACTOR", model, tokenizer)
    ctx.log.note(
        f"ACTOR: {start.model}, {parameter_count(model):,} parameters, {rows.epochs.size} rows, "
        f"{len(rows.held_out)} held out"
    )
    if goes_on:
        model = train_on_adapters(ready_for_adapters(model, config.gradient_checkpointing), start.model)
        ctx.log.note(f"ACTOR: continues with the adapters of PRETRAIN, {trained_count(model):,} parameters")
    else:
        model = with_fresh_adapters(ctx, model, start, "ACTOR", config.gradient_checkpointing)
    files, seed = ctx.files("ACTOR", config.n_checkpoints_to_keep), ctx.seed("ACTOR")
    sharding = sharding_of(ctx.config, "ACTOR")
    model = train_actor(model, encoder, rows, config, files, ctx.log, ctx.device, seed, sharding)
    publish_policy(ctx.dir / "actor", model, encoder)
    done = record(ctx, "ACTOR", "actor", config.model, rows)
    done["metrics"] = done["metrics"] | {"loss/chance": math.log(vocabulary_rows(model))}
    if "loss/eval" in (before := ctx.log.at_start.get("ACTOR", {})):
        done["metrics"]["loss/eval_start"] = before["loss/eval"]
    return done
