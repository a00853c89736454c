"""PRETRAIN, the stage before the three: long plain text, for a model that is stretched, or that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatrlhf.data.collate import Encoder
from chatrlhf.data.inputs import corpus
from chatrlhf.data.templates import FORMATS
from chatrlhf.models.adapters import save_model
from chatrlhf.models.factory import load_actor
from chatrlhf.models.generation_config import settle_generation_config
from chatrlhf.models.sizes import parameter_count
from chatrlhf.stages.run import Run, given, with_fresh_adapters
from chatrlhf.trainers.checkpoint import publish_folder
from chatrlhf.trainers.launch import sharding_of


def run_pretrain(this: Run) -> dict[str, Any]:
    """PRETRAIN: language modelling on plain text; leaves ``pretrained/``, from which the actor starts."""
    from chatrlhf.trainers.pretrain import train_on_text

    config, actor, documents = this.config.pretrain_config, this.config.actor_config, given(this.inputs.pretrain)
    model, tokenizer = load_actor(actor, corpus(this.config), this.device, config.precision)
    encoder = Encoder(tokenizer, FORMATS["raw"], config.max_sequence_length)
    for change in settle_generation_config(model, encoder):
        this.log.note(f"PRETRAIN: {change}")
    this.log.note(f"PRETRAIN: {actor.model}, {parameter_count(model):,} parameters, {len(documents.train):,} documents")
    model = with_fresh_adapters(this, model, actor, "PRETRAIN", config.gradient_checkpointing)
    files, seed = this.files("PRETRAIN", config.n_checkpoints_to_keep), this.seed("PRETRAIN")
    sharding = sharding_of(this.config, "PRETRAIN")
    model = train_on_text(model, encoder, documents, config, files, this.log, this.device, seed, sharding)

    def write(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save_pretrained(folder)  # as it was: no template belongs to plain text

    publish_folder(this.dir / "pretrained", write)
    return {
        "model": actor.model,
        "inputs": documents.files,
        "rows": {"train": len(documents.train), "held_out": len(documents.held_out)},
        "output": "pretrained",
        "metrics": this.log.last.get("PRETRAIN", {}),
    }
