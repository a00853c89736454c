"""REWARD: a model learns to judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import RewardConfig
from chatrlhf.data.collate import pad_right
from chatrlhf.data.encoder import fitting
from chatrlhf.data.epochs import Epochs
from chatrlhf.data.inputs import Rows, corpus
from chatrlhf.data.stage_rows import Preference, ScoredCompletion
from chatrlhf.errors import ConfigError
from chatrlhf.functional.agreement import pearson, ranking_accuracy, wilson_interval
from chatrlhf.models.for_stages import new_reward_model
from chatrlhf.models.loading.model_info import parameter_count, trained_count
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.runtime.checkpoints import StageFiles
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.sharding.accelerate_env import Sharding
from chatrlhf.sharding.launch import sharding_of
from chatrlhf.stages.context import RunContext, record, require
from chatrlhf.stages.global_batches import GlobalBatches
from chatrlhf.stages.hf_trainer import StageCallback, common_arguments, run_trainer
from chatrlhf.stages.readiness import why_a_coin
from chatrlhf.stages.row_order import EpochOrder, widths

STAGE = "REWARD"
MATCHED_ROWS = 1024  # that a head's own scores are taken from, before it is trained further
Judgements = Sequence[ScoredCompletion] | Sequence[Preference]


def loss_for(rows: Judgements, config: RewardConfig) -> str:
    """The loss that the rows allow: ``regression`` for scores, ``pairwise`` for preferences.

    Raises:
        ConfigError: `reward_config.loss` asks for the other one.
    """
    fitting_loss = "pairwise" if isinstance(rows[0], Preference) else "regression"
    if config.loss not in (None, fitting_loss):
        shape = "preference rows (chosen, rejected)" if fitting_loss == "pairwise" else "scored rows"
        raise ConfigError(
            f"reward_config.loss: {config.loss!r} does not fit the data, which holds {shape}; "
            f"leave it out or set it to {fitting_loss!r}"
        )
    return fitting_loss


def train_reward_model(
    scorer: RewardScorer,
    rows: Rows,
    config: RewardConfig,
    files: StageFiles,
    log: RunLog,
    device: torch.device,
    seed: int,
    sharding: Sharding = None,
) -> None:
    """Train the reward model in ``scorer`` and set its normalization.

    Raises:
        DataError: no row fits the context.
        Interrupted, CheckpointError: see `run_trainer`.
    """
    from trl import RewardConfig as TrlRewardConfig

    pairwise = loss_for(rows.train, config) == "pairwise"
    model = scorer.model
    source = config.reads_from("reward_config", "train_dataset_path")
    train_rows, kept = _that_fit(rows.train, scorer, config, source, log)
    held_out_rows = _that_fit(rows.held_out, scorer, config, "the held-out rows", log)[0] if rows.held_out else []
    epochs = rows.epochs.only(kept, source)
    if not pairwise:
        scores = torch.tensor([train_rows[i].score for i in epochs.seen()], dtype=torch.float64)
        spread = float(scores.std(correction=0))
        model.shift, model.scale = float(scores.mean()), spread if spread > 0 else 1.0
        if scorer.head_from is not None:
            _match_own_scores(scorer, train_rows)
    to_dataset = _pairs if pairwise else _targets
    train = to_dataset(train_rows, scorer)
    held_out = to_dataset(held_out_rows, scorer) if held_out_rows else None
    columns = ("chosen_ids", "rejected_ids") if pairwise else ("input_ids",)
    order = EpochOrder(epochs, config.batch_size, seed, widths(train, *columns) if config.sort_by_length else None)

    def make_trainer(callback: StageCallback, from_the_beginning: bool) -> Any:
        arguments = common_arguments(
            config, "reward_config", files.scratch, len(order), len(held_out_rows), device, seed, sharding
        )
        arguments |= {
            "eval_on_start": from_the_beginning and held_out is not None,
            "remove_unused_columns": False,
            "neftune_noise_alpha": config.neftune_noise_alpha,
        }
        pad_id = scorer.tokenizer.pad_token_id
        return _trainer_class(pairwise)(
            model=model,
            args=TrlRewardConfig(**arguments, disable_dropout=True),
            data_collator=None if pairwise else _TargetCollator(pad_id),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=scorer.tokenizer,
            callbacks=[callback],
            order=order,
        )

    def agreement() -> dict[str, float]:
        training = model.training
        metrics = held_out_agreement(scorer, held_out_rows)
        model.train(training)
        return metrics

    scorer.model = run_trainer(make_trainer, model, files, log, config.iteration_per_print, agreement, sharding, True)
    if pairwise:
        _centre_on(scorer, train_rows, epochs)
    if held_out_rows:
        metrics = held_out_agreement(scorer, held_out_rows)
        log.note(f"{STAGE}: " + describe_agreement(metrics))
        if why := why_a_coin(metrics):
            log.warn(f"{STAGE}: {why}; RL would follow noise (guards_config.stop_at_coin_flip ends a run here)")


def held_out_agreement(scorer: RewardScorer, rows: Judgements) -> dict[str, float]:
    """How far the model agrees with judgements it has not seen.

    Returns:
        ``reward/accuracy`` with a 95 % interval (``/accuracy_low``, ``/accuracy_high``): for preferences the share
        of pairs in the right order; for scores the share over all pairs of rows with different scores, whose
        interval counts rows, not pairs, since pairs share rows. For scores also ``reward/correlation``
        (Pearson) and ``reward/rmse`` (units of the score).
    """
    if isinstance(rows[0], Preference):
        chosen = scorer.score_ids([scorer.encode(row.prompt, row.chosen) for row in rows])
        rejected = scorer.score_ids([scorer.encode(row.prompt, row.rejected) for row in rows])
        # An even score is a coin toss.
        right = float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())
        accuracy, extra = right / len(rows), {}
    else:
        predicted = scorer.score_ids([scorer.encode(row.prompt, row.completion) for row in rows]).tolist()
        require = [row.score for row in rows]
        accuracy = ranking_accuracy(predicted, require)
        squares = sum((p - g) ** 2 for p, g in zip(predicted, require, strict=True))
        extra = {"reward/correlation": pearson(predicted, require), "reward/rmse": math.sqrt(squares / len(rows))}
    low, high = wilson_interval(accuracy, len(rows))
    interval = {"reward/accuracy_low": low, "reward/accuracy_high": high}
    return {"reward/accuracy": accuracy, **interval, **extra, "reward/held_out_rows": len(rows)}


def describe_agreement(metrics: dict[str, float]) -> str:
    """One line of `held_out_agreement`."""
    line = (
        f"held-out accuracy {metrics['reward/accuracy']:.3f} "
        f"(95 % interval {metrics['reward/accuracy_low']:.3f}-{metrics['reward/accuracy_high']:.3f}, "
        f"{metrics['reward/held_out_rows']} rows)"
    )
    if "reward/correlation" in metrics:
        line += f", correlation {metrics['reward/correlation']:.3f}, error {metrics['reward/rmse']:.2f} points"
    return line


def _that_fit(
    rows: Judgements, scorer: RewardScorer, config: RewardConfig, source: str, log: RunLog
) -> tuple[Any, list[int]]:
    """Rows within the context and their numbers, longer ones without their oldest turns where they are to be cut.

    `encode` would cut any row, which training must not learn from unless it is asked to.
    """
    encoder, limit = scorer.encoder, scorer.encoder.max_length

    def length(row: Any) -> int:
        replies = (row.chosen, row.rejected) if isinstance(row, Preference) else (row.completion,)
        return max(len(encoder.judged(row.prompt, reply)) for reply in replies)

    lengths = [length(row) for row in rows]
    replies = [length - len(encoder.prompt(row.prompt)) for row, length in zip(rows, lengths, strict=True)]
    if config.over_length == "cut":
        if long := sum(length > limit for length in lengths):
            log.warn(f"{STAGE}: {long} of {len(rows)} rows of {source} exceed {limit} tokens and are cut")
        # What is still too long loses the beginning of its text; a reply is judged whole or not at all.
        recent = [encoder.recent(row.prompt, limit - own) for row, own in zip(rows, replies, strict=True)]
        rows, lengths = [replace(row, prompt=prompt) for row, prompt in zip(rows, recent, strict=True)], replies
    kept, dropped = fitting(range(len(rows)), lengths, limit, source)
    if dropped:
        log.warn(f"{STAGE}: {dropped} of {len(rows)} rows of {source} exceed {limit} tokens and are dropped")
    return [rows[i] for i in kept], kept


def _pairs(rows: Sequence[Preference], scorer: RewardScorer) -> Dataset:
    return Dataset.from_dict(
        {
            "chosen_ids": [scorer.encode(row.prompt, row.chosen) for row in rows],
            "rejected_ids": [scorer.encode(row.prompt, row.rejected) for row in rows],
        }
    )


def _targets(rows: Sequence[ScoredCompletion], scorer: RewardScorer) -> Dataset:
    model = scorer.model
    return Dataset.from_dict(
        {
            "input_ids": [scorer.encode(row.prompt, row.completion) for row in rows],
            "target": [(row.score - model.shift) / model.scale for row in rows],
        }
    )


class _TargetCollator:
    """Rows of ids and one target each, right-padded."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids, mask = pad_right([row["input_ids"] for row in rows], self.pad_id)
        return {"input_ids": ids, "attention_mask": mask, "target": torch.tensor([row["target"] for row in rows])}


def _trainer_class(pairwise: bool) -> Any:
    """TRL's trainer, or the same with a squared error on standardized scores."""
    from trl import RewardTrainer

    class PairwiseTrainer(RewardTrainer):
        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """No card: TRL would write one beside each checkpoint."""

    class RegressionTrainer(PairwiseTrainer):
        def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
            return dataset

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            outputs = model(inputs["input_ids"], inputs["attention_mask"])
            loss = torch.nn.functional.mse_loss(outputs.logits.squeeze(-1), inputs["target"])
            return (loss, outputs) if return_outputs else loss

    class Trainer(GlobalBatches, PairwiseTrainer if pairwise else RegressionTrainer):
        pass

    return Trainer


def _match_own_scores(scorer: RewardScorer, rows: Sequence[ScoredCompletion]) -> None:
    """A head that was trained before keeps its unit: scale and shift bring its scores to the mean and deviation of the
    targets, so that training starts from what it knows. A spread below 1 is not enlarged, which would enlarge each
    training step, too.
    """
    model, scale, shift = scorer.model, scorer.model.scale, scorer.model.shift
    model.scale, model.shift = 1.0, 0.0
    sample = rows[:: -(-len(rows) // MATCHED_ROWS)]
    own = scorer.score_ids([scorer.encode(row.prompt, row.completion) for row in sample]).double()
    model.scale = scale / max(float(own.std(correction=0)), 1.0)
    model.shift = shift - float(own.mean()) * model.scale


def _centre_on(scorer: RewardScorer, rows: Sequence[Preference], epochs: Epochs) -> None:
    """Bradley-Terry leaves the zero free: put it at the mean of the training completions, their deviation at 1.

    A completion counts as often as it was seen.
    """
    model = scorer.model
    model.scale, model.shift = 1.0, 0.0
    replies = [(row.prompt, reply) for row in rows for reply in (row.chosen, row.rejected)]
    scores = scorer.score_ids([scorer.encode(prompt, reply) for prompt, reply in replies]).double()
    scores = scores.view(-1, 2)[torch.from_numpy(epochs.seen())]
    spread = float(scores.std(correction=0))
    model.scale = 1.0 / spread if spread > 0 else 1.0
    model.shift = -float(scores.mean()) * model.scale


def run_reward(ctx: RunContext) -> dict[str, Any]:
    """REWARD: train a model to score completions; leaves ``reward/``."""

    config, rows = ctx.config.reward_config, require(ctx.inputs.reward)
    actor = ctx.trained("ACTOR", "actor", ctx.config.actor_config.model)
    if config.model == "actor" and actor is None:
        ctx.log.warn(f"REWARD: no fine-tuned actor here, so the reward model starts from {ctx.start_name()} as it is")
    elif config.model == "actor":
        ctx.warn_unapplied_scaling(str(actor), heeded=False)
    adapters = load_peft_config(ctx.config, "reward_config") if config.peft_enable else None
    whole = ctx.config.model_copy(update={"actor_config": ctx.start()})
    scorer = new_reward_model(whole, actor, corpus(ctx.config), ctx.device, adapters)
    ctx.log.note(
        f"REWARD: {config.model}, {parameter_count(scorer.model):,} parameters, {loss_for(rows.train, config)} on "
        f"{rows.epochs.size} rows, {len(rows.held_out)} held out"
    )
    ctx.log.note(
        "REWARD: starts with a fresh head"
        if scorer.head_from is None
        else f"REWARD: trains the head of {scorer.head_from} further, on its own pooling"
    )
    if adapters is not None:
        ctx.log.note(f"REWARD: trains adapters and a head alone, {trained_count(scorer.model):,} parameters")
    files, seed = ctx.files("REWARD", config.n_checkpoints_to_keep), ctx.seed("REWARD")
    sharding = sharding_of(ctx.config, "REWARD")
    train_reward_model(scorer, rows, config, files, ctx.log, ctx.device, seed, sharding)
    publish_folder(ctx.dir / "reward", scorer.save)
    return record(ctx, "REWARD", "reward", config.model, rows)
