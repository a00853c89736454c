"""REWARD: a model learns to judge."""

from __future__ import annotations

from typing import Any

from chatrlhf.config.load import load_peft_config
from chatrlhf.data.inputs import corpus
from chatrlhf.models.factory import new_reward_model
from chatrlhf.models.sizes import parameter_count, trained_count
from chatrlhf.stages.run import Run, given, record
from chatrlhf.trainers.checkpoint import publish_folder
from chatrlhf.trainers.launch import sharding_of


def run_reward(this: Run) -> dict[str, Any]:
    """REWARD: train a model to score completions; leaves ``reward/``."""
    from chatrlhf.trainers.reward import loss_for, train_reward_model

    config, rows = this.config.reward_config, given(this.inputs.reward)
    actor = this.trained("ACTOR", "actor", this.config.actor_config.model)
    if config.model == "actor" and actor is None:
        this.log.warn(f"REWARD: no fine-tuned actor here, so the reward model starts from {this.start_name()} as it is")
    elif config.model == "actor":
        this.warn_of_scaling(str(actor), heeded=False)
    adapters = load_peft_config(this.config, "reward_config") if config.peft_enable else None
    whole = this.config.model_copy(update={"actor_config": this.start()})
    scorer = new_reward_model(whole, actor, corpus(this.config), this.device, adapters)
    this.log.note(
        f"REWARD: {config.model}, {parameter_count(scorer.model):,} parameters, {loss_for(rows.train, config)} on "
        f"{rows.epochs.size} rows, {len(rows.held_out)} held out"
    )
    this.log.note(
        "REWARD: starts with a fresh head"
        if scorer.head_from is None
        else f"REWARD: trains the head of {scorer.head_from} further, on its own pooling"
    )
    if adapters is not None:
        this.log.note(f"REWARD: trains adapters and a head alone, {trained_count(scorer.model):,} parameters")
    files, seed = this.files("REWARD", config.n_checkpoints_to_keep), this.seed("REWARD")
    sharding = sharding_of(this.config, "REWARD")
    train_reward_model(scorer, rows, config, files, this.log, this.device, seed, sharding)
    publish_folder(this.dir / "reward", scorer.save)
    return record(this, "REWARD", "reward", config.model, rows)
