"""The stage before the three: long plain text, for a model that is stretched, or that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import ActorConfig
from chatrlhf.data.collate import Encoder
from chatrlhf.data.inputs import corpus
from chatrlhf.data.templates import FORMATS
from chatrlhf.models.adapters import save_model, where, with_adapters
from chatrlhf.models.factory import load_actor, parameter_count, trained_count
from chatrlhf.models.quantization import ready_for_adapters
from chatrlhf.trainers.checkpoint import publish_folder
from chatrlhf.trainers.launch import sharding_of

if TYPE_CHECKING:
    from chatrlhf.pipeline import Run


def run_pretrain(this: Run) -> dict[str, Any]:
    """PRETRAIN: language modelling on plain text; leaves ``pretrained/``, from which the actor starts."""
    from chatrlhf.trainers.pretrain import train_on_text

    config, actor, documents = this.config.pretrain_config, this.config.actor_config, this.inputs.pretrain
    assert documents is not None, "a stage runs only after its inputs were read"
    model, tokenizer = load_actor(actor, corpus(this.config), this.device, config.precision)
    encoder = Encoder(tokenizer, FORMATS["raw"], config.max_sequence_length)
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


def with_fresh_adapters(
    this: Run, model: nn.Module, start: ActorConfig, stage: str, gradient_checkpointing: bool
) -> nn.Module:
    """The model of a stage on others' trainers with fresh adapters, where adapters are to be trained."""
    if not start.peft_enable:
        return model
    model = ready_for_adapters(model, gradient_checkpointing)
    model = with_adapters(model, load_peft_config(this.config), where(start.model), start.revision)
    this.log.note(f"{stage}: trains adapters alone, {trained_count(model):,} parameters")
    return model
