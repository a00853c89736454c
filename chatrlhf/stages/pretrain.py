"""PRETRAIN, the stage before the three: language modeling on long plain text."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn

from chatrlhf.config.schema import PretrainConfig
from chatrlhf.data.documents import SECTION, Documents
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import corpus
from chatrlhf.data.templates import FORMATS
from chatrlhf.data.token_stream import StreamOrder, Windows, write_stream
from chatrlhf.errors import DataError
from chatrlhf.models.for_stages import load_actor
from chatrlhf.models.loading.generation_config import settle_generation_config
from chatrlhf.models.loading.lora import save_model
from chatrlhf.models.loading.model_info import parameter_count
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.runtime.checkpoints import StageFiles
from chatrlhf.runtime.collectives import barrier, gather_results, is_main
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.sharding.accelerate_env import Sharding
from chatrlhf.sharding.launch import sharding_of
from chatrlhf.stages.context import RunContext, require, with_fresh_adapters
from chatrlhf.stages.global_batches import GlobalBatches
from chatrlhf.stages.hf_trainer import StageCallback, common_arguments, run_trainer
from chatrlhf.stages.resumable_trainer import order_state

STAGE = "PRETRAIN"
MOST_HELD_OUT = 64  # rows


def train_on_text(
    model: nn.Module,
    encoder: Encoder,
    documents: Documents,
    config: PretrainConfig,
    files: StageFiles,
    log: RunLog,
    device: torch.device,
    seed: int,
    sharding: Sharding = None,
) -> nn.Module:
    """Train ``model`` to predict every token of its rows, in place unless it is sharded, and return it.

    Args:
        encoder: of which only what it does with plain text matters.

    Raises:
        DataError: the text does not fill a row.
        Interrupted, CheckpointError: see `run_trainer`.
    """
    from transformers import Trainer, TrainingArguments

    class TextTrainer(GlobalBatches, Trainer):
        pass

    # Not among the checkpoints: what a run that was killed left of them is written again, and is the same.
    folder = files.scratch.with_name(f".tokens-{STAGE}")
    try:
        rows_of_all_steps = _rows_of_all_steps(config, files)
        train, held_out = _rows(documents, encoder, config, rows_of_all_steps, folder, log)
        order = StreamOrder(rows_of_all_steps, len(train), config.batch_size, seed)

        def make_trainer(callback: StageCallback, from_the_beginning: bool) -> Trainer:
            rows = 0 if held_out is None else len(held_out)
            arguments = common_arguments(config, SECTION, files.scratch, len(order), rows, device, seed, sharding)
            del arguments["max_length"]  # TRL's
            arguments |= {
                "per_device_eval_batch_size": arguments["per_device_train_batch_size"],  # the rows are as long
                "eval_on_start": from_the_beginning and held_out is not None,
                "remove_unused_columns": False,
            }
            return TextTrainer(
                model=model,
                args=TrainingArguments(**arguments),
                train_dataset=train,
                eval_dataset=held_out,
                processing_class=encoder.tokenizer,
                callbacks=[callback],
                order=order,
            )

        return run_trainer(make_trainer, model, files, log, config.iteration_per_print, sharding=sharding)
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _rows_of_all_steps(config: PretrainConfig, files: StageFiles) -> int:
    """Rows that a run sees: those before it was resumed, and those of the steps that are left."""
    done, path = files.newest or (0, None)
    state = order_state(path) if path is not None else None
    seen = state["rows"] if state is not None else done * config.batch_size
    return seen + max(config.steps - done, 0) * config.batch_size


def _rows(
    documents: Documents, encoder: Encoder, config: PretrainConfig, rows: int, folder: Path, log: RunLog
) -> tuple[Windows, Windows | None]:
    """Rows to train on, and held-out ones where there is text for them. All ranks read what rank 0 writes.

    Args:
        rows: of all steps.
    """
    length = config.max_sequence_length

    def write() -> tuple[int, int]:
        if not is_main():
            return 0, 0
        tokens = write_stream(documents.in_order(), encoder, rows * length, folder / "train")
        if tokens < length:
            raise DataError(
                f"{config.reads_from(SECTION, 'train_dataset_path')}: the text has {tokens:,} tokens, which do not "
                f"fill a row of {length:,}; give more of it, or lower {SECTION}.max_sequence_length"
            )
        return tokens, write_stream(documents.held_out, encoder, MOST_HELD_OUT * length, folder / "held_out")

    barrier()  # no one may still be removing an earlier run's
    tokens, aside = gather_results(write)[0]
    passes = rows * length / tokens
    log.note(
        f"{STAGE}: {config.steps} steps, {rows:,} rows of {length:,} tokens, out of a stream of {tokens:,}"
        + (f" that is read {passes:.1f} times" if passes > 1 else "")
    )
    # Of a text shorter than a row all is one row; a single token predicts nothing.
    held_out = Windows(folder / "held_out", encoder, min(length, aside)) if aside > 1 else None
    return Windows(folder / "train", encoder, length), held_out


def run_pretrain(ctx: RunContext) -> dict[str, Any]:
    """PRETRAIN: language modeling on plain text; leaves ``pretrained/``, from which the actor starts."""

    config, actor, documents = ctx.config.pretrain_config, ctx.config.actor_config, require(ctx.inputs.pretrain)
    model, tokenizer = load_actor(actor, corpus(ctx.config), ctx.device, config.precision)
    encoder = Encoder(tokenizer, FORMATS["raw"], config.max_sequence_length)
    for change in settle_generation_config(model, encoder):
        ctx.log.note(f"PRETRAIN: {change}")
    ctx.log.note(f"PRETRAIN: {actor.model}, {parameter_count(model):,} parameters, {len(documents.train):,} documents")
    model = with_fresh_adapters(ctx, model, actor, "PRETRAIN", config.gradient_checkpointing)
    files, seed = ctx.files("PRETRAIN", config.n_checkpoints_to_keep), ctx.seed("PRETRAIN")
    sharding = sharding_of(ctx.config, "PRETRAIN")
    model = train_on_text(model, encoder, documents, config, files, ctx.log, ctx.device, seed, sharding)

    def write(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save_pretrained(folder)  # as it was: no template belongs to plain text

    publish_folder(ctx.dir / "pretrained", write)
    return {
        "model": actor.model,
        "inputs": documents.files,
        "rows": {"train": len(documents.train), "held_out": len(documents.held_out)},
        "output": "pretrained",
        "metrics": ctx.log.last.get("PRETRAIN", {}),
    }
