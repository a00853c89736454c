"""ACTOR: a language model learns from demonstrations."""

from __future__ import annotations

from typing import Any

from chatrlhf.data.inputs import corpus
from chatrlhf.models.adapter_loading import train_on_adapters
from chatrlhf.models.adapters import base_of
from chatrlhf.models.factory import load_actor, load_base
from chatrlhf.models.quantization import ready_for_adapters
from chatrlhf.models.sizes import parameter_count, trained_count
from chatrlhf.stages.run import Run, given, policy_encoder, publish_policy, record, with_fresh_adapters
from chatrlhf.trainers.launch import sharding_of


def run_actor(this: Run) -> dict[str, Any]:
    """ACTOR: fine-tune the language model on demonstrations; leaves ``actor/``."""
    from chatrlhf.trainers.sft import train_actor

    config, rows = this.config.actor_config, given(this.inputs.actor)
    start = this.start()
    if start is config and this.config.pretrain_config.names_data:
        this.log.warn("ACTOR: no pretrained model in this folder, so it starts from actor_config.model as it is")
    this.warn_of_scaling(start.model)
    goes_on = config.peft_enable and start is not config and base_of(start.model) is not None
    load = load_base if goes_on else load_actor
    model, tokenizer = load(start, corpus(this.config), this.device, config.precision)
    encoder = policy_encoder(this, "ACTOR", model, tokenizer)
    this.log.note(
        f"ACTOR: {start.model}, {parameter_count(model):,} parameters, {rows.epochs.size} rows, "
        f"{len(rows.held_out)} held out"
    )
    if goes_on:
        model = train_on_adapters(ready_for_adapters(model, config.gradient_checkpointing), start.model)
        this.log.note(f"ACTOR: goes on with the adapters of PRETRAIN, {trained_count(model):,} parameters")
    else:
        model = with_fresh_adapters(this, model, start, "ACTOR", config.gradient_checkpointing)
    files, seed = this.files("ACTOR", config.n_checkpoints_to_keep), this.seed("ACTOR")
    sharding = sharding_of(this.config, "ACTOR")
    model = train_actor(model, encoder, rows, config, files, this.log, this.device, seed, sharding)
    publish_policy(this.dir / "actor", model, encoder)
    return record(this, "ACTOR", "actor", config.model, rows)
