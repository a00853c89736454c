"""What all stages of a run share, and how each hands over what it made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.on_resume import settings_of
from chatrlhf.config.schema import ActorConfig, Config
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import Inputs, Rows
from chatrlhf.data.templates import actor_template
from chatrlhf.models.for_stages import encoder_class
from chatrlhf.models.loading.generation_config import settle_generation_config
from chatrlhf.models.loading.lora import save_model, where, with_adapters
from chatrlhf.models.loading.model_info import context_length, trained_count
from chatrlhf.models.loading.quantization import ready_for_adapters
from chatrlhf.models.loading.rope_mismatch import scaling_warning
from chatrlhf.models.stop_tokens import ids_in_generation_config
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.runtime.atomic_files import publish_folder
from chatrlhf.runtime.checkpoints import CheckpointStore, StageFiles
from chatrlhf.runtime.manifest import OUTPUTS, Manifest
from chatrlhf.runtime.run_log import RunLog
from chatrlhf.runtime.seeding import step_seed
from chatrlhf.runtime.whole_folders import RECORDED, listing_hashes
from chatrlhf.stages.sources import Sources

Read = TypeVar("Read")


@dataclass
class RunContext:
    """What all stages of one run share."""

    config: Config
    inputs: Inputs
    log: RunLog
    manifest: Manifest
    device: torch.device
    reward: FunctionReward | None  # takes the reward model's place
    resume: bool
    stages: list[str]  # that this run trains, in their order

    @property
    def sources(self) -> Sources:
        return Sources(self.config, self.manifest, self.inputs, self.reward, self.log.note)

    @property
    def dir(self) -> Path:
        return self.manifest.run_dir

    def files(self, stage: str, keep: int) -> StageFiles:
        """Where a stage keeps its checkpoints."""
        checkpoints = self.dir / "checkpoints"
        store = CheckpointStore(checkpoints / stage, keep, self.log.warn)
        scratch = checkpoints / f".scratch-{stage}"
        made_from = self.sources.made_from(stage)

        def record() -> None:
            if not self.resume:
                self.manifest.set_aside(self._made_anew(stage), self.log.note)
            self.manifest.start(stage, made_from, settings_of(stage, self.config.model_dump(mode="json")))

        limit = self.config.guards_config.skipped_steps
        return StageFiles(stage, store, scratch, self.resume, record, limit)

    def _made_anew(self, stage: str) -> list[str]:
        """A stage that begins and those behind it: from here on --resume is to find nothing of an earlier run of them.

        A stage whose earlier results are what a section starts from keeps them until it has read them.
        """
        later = self.stages[self.stages.index(stage) + 1 :]
        return [stage, *(each for each in later if not any(map(self._is_a_start, OUTPUTS[each])))]

    def _is_a_start(self, output: str) -> bool:
        sections = (self.config.actor_config, self.config.reward_config, self.config.critic_config)
        place = (self.dir / output).resolve()
        return any(each.model is not None and Path(each.model).resolve() == place for each in sections)

    def seed(self, stage: str) -> int:
        return step_seed(self.config.seed, 0, stage) % 2**31

    def trained(self, stage: str, folder: str, model: str | None) -> Path | None:
        """See `Sources`."""
        return self.sources.trained(stage, folder, model)

    def start(self) -> ActorConfig:
        """See `Sources`."""
        return self.sources.start()

    def start_name(self) -> str:
        """Of `start`, for people."""
        return "actor_config.model" if self.start() is self.config.actor_config else "the pretrained model"

    def warn_unapplied_scaling(self, model: str, heeded: bool = True) -> None:
        """Where adapters are about to meet other rotary positions than they were trained with."""
        warning = scaling_warning(model, self.config.actor_config.rope_scaling, heeded)
        if warning is not None:
            self.log.warn(warning)


def encoder_of(config: Config, model: nn.Module, tokenizer: Any, template: Any = None) -> Encoder:
    """What makes ids of the actor's rows; the template is the configuration's unless one is given."""
    limit = min(config.actor_config.max_sequence_length, context_length(model))
    template = template or actor_template(config, tokenizer)
    return encoder_class(model.config).of(tokenizer, template, limit)


def policy_encoder(ctx: RunContext, stage: str, model: nn.Module, tokenizer: Any, template: Any = None) -> Encoder:
    """`encoder_of` a policy, whose configurations from now on say what ends its replies, and can be saved."""
    own_eos = tokenizer.eos_token_id  # the encoder may give it another
    encoder = encoder_of(ctx.config, model, tokenizer, template)
    for change in settle_generation_config(model, encoder, own_eos):
        ctx.log.note(f"{stage}: {change}")
    eos = encoder.tokenizer.eos_token
    if ctx.config.actor_config.peft_enable and encoder.tokenizer.eos_token_id not in ids_in_generation_config(model):
        ctx.log.warn(
            f"{stage}: with adapters transformers reads the generation_config.json of their base, which does not end "
            f"texts with {eos}; pass generation_config=GenerationConfig.from_pretrained(folder), or merge them first "
            "(chatrlhf export merge)"
        )
    return encoder


def publish_policy(target: Path, model: nn.Module, encoder: Encoder) -> None:
    """A folder that transformers' Auto classes load, complete or absent."""

    def write(folder: Path) -> None:
        save_model(model, folder)
        encoder.save(folder)

    publish_folder(target, write)


def record(ctx: RunContext, stage: str, output: str, model: str | None, rows: Rows) -> dict[str, Any]:
    """What the manifest keeps of a finished stage; ``model`` is what it was made from."""
    return {
        "model": model,
        "inputs": rows.files,
        "rows": {"train": rows.epochs.size, "held_out": len(rows.held_out)},
        "output": output,
        RECORDED: listing_hashes(ctx.dir, OUTPUTS[stage]),
        "metrics": ctx.log.last.get(stage, {}),
    }


def require(rows: Read | None) -> Read:
    """A stage's rows, which were read before anything ran."""
    assert rows is not None, "a stage runs only after its inputs were read"
    return rows


def with_fresh_adapters(
    ctx: RunContext, model: nn.Module, start: ActorConfig, stage: str, gradient_checkpointing: bool
) -> nn.Module:
    """The model of a stage on others' trainers with fresh adapters, where adapters are to be trained."""
    if not start.peft_enable:
        return model
    model = ready_for_adapters(model, gradient_checkpointing)
    model = with_adapters(model, load_peft_config(ctx.config), where(start.model), start.revision)
    ctx.log.note(f"{stage}: trains adapters alone, {trained_count(model):,} parameters")
    return model
