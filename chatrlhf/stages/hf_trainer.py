"""What the stages on transformers' and TRL's trainers share: arguments, logging, publication of checkpoints, resume.

TRL trains; this file makes its checkpoints as safe as the RL stage's. Transformers writes a checkpoint into a
scratch folder, and only when it is whole is it hashed and renamed into ``checkpoints/<stage>/step-NNNNNN``.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from chatrlhf.config.schema import ActorConfig, PretrainConfig, RewardConfig
from chatrlhf.errors import CheckpointError, Interrupted
from chatrlhf.errors.boundary import doing
from chatrlhf.models.loading.model_info import fingerprint
from chatrlhf.runtime.checkpoints import CheckpointStore, StageFiles
from chatrlhf.runtime.collectives import barrier, is_main, world_size
from chatrlhf.runtime.device import resolve_precision
from chatrlhf.runtime.fault_points import reached
from chatrlhf.runtime.finite import moments, require_finite, trained
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.signals import StopRequest
from chatrlhf.runtime.skipped_steps import SkippedSteps
from chatrlhf.sharding.accelerate_env import DeepSpeed, Sharding, environment_for
from chatrlhf.sharding.checkpoint_layout import check_sharding, write_sharding
from chatrlhf.sharding.gather import meta_copy, unshard
from chatrlhf.sharding.launch import microbatching
from chatrlhf.sharding.safe_loading import known_objects
from chatrlhf.stages.resumable_trainer import ORDER, order_state

FINGERPRINT = "model_fingerprint.txt"
EVALUATED_TOKENS = 16 * 1024  # of a batch of held-out rows, at the most

# TRL's and transformers' names -> ours. What is not listed is not logged: either it says nothing (runtime,
# epoch) or it counts from the last start and would differ after a resume (num_tokens).
METRIC_NAMES = {
    "loss": "loss/train",
    "eval_loss": "loss/eval",
    "grad_norm": "grad_norm",
    "learning_rate": "lr",
    "mean_token_accuracy": "token_accuracy",
    "accuracy": "reward/accuracy_train",
}


OF_A_STEP = ("loss/train", "grad_norm", "token_accuracy", "reward/accuracy_train")


def common_arguments(
    config: PretrainConfig | ActorConfig | RewardConfig,
    section: str,
    scratch: Path,
    rows: int,
    held_out: int,
    device: torch.device,
    seed: int,
    sharding: Sharding,
) -> dict[str, Any]:
    """Training arguments as the section of a stage gives them.

    Args:
        section: its name, for messages.
        rows: training rows, which set the length of an epoch.
        held_out: evaluation rows; 0 turns evaluation off.
        sharding: who deals the model out, where that is asked for.
    """
    micro, accumulated = microbatching(config, section)
    steps_an_epoch = -(-rows // config.batch_size)
    return {
        "output_dir": str(scratch),
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": eval_batch_size(micro, config.max_sequence_length),
        "gradient_accumulation_steps": accumulated,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "max_grad_norm": config.max_grad_norm or 0.0,
        "optim": "adamw_torch_fused",
        "bf16": resolve_precision(config.precision, device) == "bf16",
        "fp16": resolve_precision(config.precision, device) == "fp16",
        "use_cpu": device.type == "cpu",
        "logging_nan_inf_filter": False,  # it would hide them; `FiniteSteps` deals with them
        # Every step is logged: an average over several would not survive a resume bit for bit.
        "logging_steps": 1,
        "eval_strategy": "steps" if held_out else "no",
        "eval_steps": config.eval_interval or steps_an_epoch,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_steps,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
        "gradient_checkpointing": config.gradient_checkpointing,  # which is on where nothing is said
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if config.gradient_checkpointing else None,
        "prediction_loss_only": True,
        "max_length": None,
        "deepspeed": copy.deepcopy(sharding.settings) if isinstance(sharding, DeepSpeed) else None,
    }


def eval_batch_size(micro: int, max_sequence_length: int) -> int:
    """Held-out rows of a batch: as many as are quick, and long ones no more than a backward has.

    Nothing is kept of them for a backward, but the logits of all positions are there at once.
    """
    return max(micro, min(16, EVALUATED_TOKENS // max_sequence_length))


class StageCallback(TrainerCallback):
    """Logs, publishes checkpoints, honors a request to stop, and evaluates and saves at the last step."""

    def __init__(
        self,
        stage: str,
        log: RunLog,
        store: CheckpointStore,
        stop: StopRequest,
        fingerprint: str,
        on_evaluate: Callable[[], Mapping[str, float]] | None = None,
        sharding: Sharding = None,
    ) -> None:
        self.stage, self.log, self.store, self.stop = stage, log, store, stop
        self.fingerprint, self.extra_metrics, self.sharding = fingerprint, on_evaluate, sharding
        self.trainer: Any = None  # which is made after this
        self.published: Path | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        reached("trainer.log")
        metrics = {METRIC_NAMES[name]: value for name, value in logs.items() if name in METRIC_NAMES}
        if "loss/eval" in metrics and self.extra_metrics is not None:
            metrics |= self.extra_metrics()  # by all ranks, which may each hold a part of the model
        if self.trainer.step_was_skipped:  # the sums of a step that was not taken say nothing
            metrics = {name: value for name, value in metrics.items() if name not in OF_A_STEP}
            metrics["guard/skipped_steps"] = self.trainer.skipped.total
        if metrics and is_main():
            self.log.step(self.stage, state.global_step, metrics)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        self.trainer.check_step(model, optimizer, state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> Any:
        reached("trainer.step", state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True
        return self._stop_if_asked(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> Any:
        return self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> TrainerControl:
        if self.stop.any_rank_stopped() is not None:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any,
        optimizer: Any,
        **_: Any,
    ) -> None:
        require_finite(
            f"{self.stage} step {state.global_step}",
            chain(trained(model), moments(optimizer)),
            f"the checkpoint before stays. {self.trainer.skipped.remedy}, then use --resume",
        )
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"

        def move(folder: Path) -> None:
            for path in written.iterdir():
                reached("trainer.publish")
                shutil.move(str(path), folder / path.name)
            (folder / FINGERPRINT).write_text(self.fingerprint, encoding="utf-8")
            seen = self.trainer.order.state_dict() | {"skipped": self.trainer.skipped.state_dict()}
            (folder / ORDER).write_text(json.dumps(seen) + "\n", encoding="utf-8")
            write_sharding(folder, self.sharding)
            self.log.save_digests(self.stage, folder)

        self.published = self.store.publish(state.global_step, move)
        if is_main():
            shutil.rmtree(written)


def run_trainer(
    make_trainer: Callable[[StageCallback, bool], Any],
    model: torch.nn.Module,
    files: StageFiles,
    log: RunLog,
    every: int,
    on_evaluate: Callable[[], Mapping[str, float]] | None = None,
    sharding: Sharding = None,
    needed_by_all: bool = False,
) -> torch.nn.Module:
    """Train, from the newest checkpoint on ``resume``.

    Args:
        make_trainer: given the callback and whether the run starts at its beginning, the trainer.
        every: optimizer steps between two lines on a plain output.
        sharding: who deals the model out.
        needed_by_all: whether all ranks go on with the model; else one that was sharded is rank 0's, to be saved.

    Returns:
        The trained model: ``model`` itself, but for one that was sharded.

    Raises:
        Interrupted: the run was asked to stop; a checkpoint is there.
        CheckpointError: the checkpoints are damaged, of another model, or sharded in another way.
    """
    files.begin(model)
    stage, store = files.stage, files.store
    done, path = files.newest or (0, None)
    if path is not None and (path / FINGERPRINT).read_text(encoding="utf-8") != fingerprint(model):
        raise CheckpointError(
            f"{path}: it is a checkpoint of another model (other parameters than this configuration's); "
            "set the model back, or use another output_dir"
        )
    if path is not None:
        check_sharding(path, sharding)
        log.note(f"{stage}: resumed from {path}")
    elif files.resume:
        log.note(f"{stage}: no checkpoint was published yet, so it starts at its beginning")
    log.rewind(stage, done if path is not None else -1)
    if path is not None:
        log.compare(stage, path)
    device = next(model.parameters()).device
    bare = meta_copy(model) if sharding is not None else None
    with environment_for(sharding), StopRequest() as stop:
        callback = StageCallback(stage, log, store, stop, fingerprint(model), on_evaluate, sharding)
        trainer = make_trainer(callback, path is None)
        trainer.remove_callback(PrinterCallback)  # it prints each step's dictionary
        callback.trainer = trainer
        trainer.skipped = SkippedSteps(stage, store.folder, files.skipped_limit, log.warn, remedy(stage))
        if path is not None:
            trainer.resume_rows(path, done)
            trainer.skipped.load_state_dict((order_state(path) or {}).get("skipped", trainer.skipped.state_dict()))
            if trainer.total_steps == done:
                log.note(f"{stage}: all its {done} steps were trained before, there is nothing left to do")
        for weight in model.parameters():
            # TRL makes adapters on quantized weights bfloat16, in which small steps would be lost.
            if weight.requires_grad:
                weight.data = weight.data.float()
        writes = doing(f"{stage}: training, with checkpoints in", store.folder)
        reads = known_objects(path) if path is not None and sharding is not None else nullcontext()
        with writes, reads, log.stage(stage, trainer.total_steps, done, every):
            trainer.train(resume_from_checkpoint=str(path) if path else None)
        request = stop.any_rank_stopped()
        if request is not None and trainer.state.global_step < trainer.state.max_steps:
            shutil.rmtree(files.scratch, ignore_errors=True)
            raise Interrupted(request, f"continue with --resume (checkpoint {callback.published})")
        if bare is not None:
            log.note(
                f"{stage}: trained by {sharding} in {world_size()} processes ({type(trainer.model_wrapped).__name__})"
            )
            model = unshard(bare, model, needed_by_all or is_main())
            _release(trainer)
            if needed_by_all:
                model.to(device)
    barrier()
    if is_main():
        shutil.rmtree(files.scratch, ignore_errors=True)
    return model


def remedy(stage: str) -> str:
    """What to change where a stage's losses or gradients are not finite."""
    section = f"{stage.lower()}_config"
    return f"Lower {section}.lr, raise {section}.warmup_steps, or set {section}.precision to bf16 or fp32"


def _release(trainer: Any) -> None:
    """Free what a sharded model has left in memory besides its weights."""
    engine = trainer.model_wrapped
    if hasattr(engine, "destroy"):  # DeepSpeed's
        engine.destroy()
    trainer.accelerator.free_memory()
