"""What a stage is made from, by hashes: --resume continues only where all of it is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import ActorConfig, Config
from chatrlhf.data.inputs import Inputs, corpus
from chatrlhf.data.templates import get_template, is_own
from chatrlhf.models.classifier import LazyClassifier
from chatrlhf.models.for_stages import require_reward_model
from chatrlhf.models.loading.lora import base_of
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.rl.rewards import FunctionReward, is_url
from chatrlhf.runtime.collectives import gather_results, is_main
from chatrlhf.runtime.manifest import Manifest
from chatrlhf.sharding.deepspeed_config import read_deepspeed_config
from chatrlhf.stages import identity
from chatrlhf.stages.resume import CORPUS, DATA


@dataclass(frozen=True)
class Sources:
    """A run's configuration and folder, from which follows what each stage starts from."""

    config: Config
    manifest: Manifest
    inputs: Inputs
    reward: FunctionReward | None
    note: Callable[[str], None]

    def trained(self, stage: str, folder: str, model: str | None) -> Path | None:
        """Folder of a stage's result, if it is there and was made from ``model``."""
        made_from, place = self.manifest.stages.get(stage, {}).get("model"), self.manifest.run_dir / folder
        return place if made_from == model and place.exists() else None

    def start(self) -> ActorConfig:
        """The actor's settings with the model that it starts from: what PRETRAIN has left, or what they name."""
        settings = self.config.actor_config
        folder = self.trained("PRETRAIN", "pretrained", settings.model)
        if folder is None:
            return settings
        # Its tokenizer lies beside it; of what adapters belong to the revision continues to matter.
        revision = settings.revision if base_of(str(folder)) is not None else None
        return settings.model_copy(update={"model": str(folder), "tokenizer_path": None, "revision": revision})

    def starts_from(self, stage: str) -> tuple[str, ...]:
        """The stages whose results a stage starts from, where they are there."""
        if stage == "ACTOR":
            return ("PRETRAIN",)
        if stage == "REWARD":
            return ("PRETRAIN", "ACTOR") if self.config.reward_config.model == "actor" else ()
        if stage == "RL":
            return ("PRETRAIN", "ACTOR") if self.reward is not None else ("PRETRAIN", "ACTOR", "REWARD")
        return ()

    def made_from(self, stage: str) -> dict[str, Any]:
        """What a stage is made from; rank 0's hashes on all ranks."""
        of_stage = {"PRETRAIN": self._pretrain, "ACTOR": self._actor, "REWARD": self._reward, "RL": self._rl}[stage]
        return gather_results(lambda: of_stage() if is_main() else {})[0]

    def _pretrain(self) -> dict[str, Any]:
        assert self.inputs.pretrain is not None
        settings = self.config.actor_config
        return {DATA: self.inputs.pretrain.files, **self._model(settings), **self._training("actor_config")}

    def _actor(self) -> dict[str, Any]:
        assert self.inputs.actor is not None
        made_from = {DATA: self.inputs.actor.files, **self._model(self.start()), **self._training("actor_config")}
        return made_from | self._template("actor_config.template", self.config.actor_config.template)

    def _reward(self) -> dict[str, Any]:
        assert self.inputs.reward is not None
        config = self.config.reward_config
        made_from = {DATA: self.inputs.reward.files, **self._training("reward_config")}
        made_from |= self._template("reward_config.template", config.template or self.config.actor_config.template)
        if config.model in ("actor", TINY):
            actor = self.trained("ACTOR", "actor", self.config.actor_config.model) if config.model == "actor" else None
            return made_from | (self._folder("reward_config.model", actor) if actor else self._model(self.start()))
        return made_from | self._named_reward_model()

    def _rl(self) -> dict[str, Any]:
        assert self.inputs.prompts is not None
        made_from = {DATA: self.inputs.prompts.files, **self._training("actor_config"), **self._judge()}
        actor = self.trained("ACTOR", "actor", self.config.actor_config.model)
        made_from |= self._folder("actor_config.model", actor) if actor else self._model(self.start())
        if actor is None:
            made_from |= self._template("actor_config.template", self.config.actor_config.template)
        critic = self.config.critic_config
        if critic.model not in (None, "shared", TINY):
            made_from["critic_config.model"] = [critic.model, identity.of_model(str(critic.model), None, self.note)]
        if critic.peft_enable:
            made_from |= self._adapters("critic_config")
        return made_from

    def _judge(self) -> dict[str, Any]:
        """What gives RL its rewards."""
        config = self.config.reward_config
        if self.reward is None:
            return self._folder("reward_config.model", require_reward_model(self.manifest.run_dir / "reward", config))
        if isinstance(self.reward.function, LazyClassifier):
            return self._named_reward_model()
        if is_url(self.reward.name):
            return {}
        module = config.reward_fn.partition(":")[0] if config.reward_fn == self.reward.name else None
        return {"reward_config.reward_fn": [self.reward.name, identity.of_function(self.reward.function, module)]}

    def _named_reward_model(self) -> dict[str, Any]:
        config = self.config.reward_config
        tokens = config.tokenizer_path or str(config.model)
        return {
            "reward_config.model": [config.model, identity.of_model(str(config.model), config.revision, self.note)],
            "reward_config.tokenizer_path": [tokens, identity.of_tokenizer(tokens, config.revision)],
        }

    def _model(self, settings: ActorConfig) -> dict[str, Any]:
        """A model that actor_config describes, and its tokenizer."""
        if settings.model == TINY and settings.tokenizer_path is None:
            texts = identity.of_values(corpus(self.config))
            return {CORPUS: ["all data files, of which it is made,", texts]}
        tokens = settings.tokenizer_path or settings.model
        made_from = {"actor_config.tokenizer_path": [tokens, identity.of_tokenizer(tokens, settings.revision)]}
        if settings.model != TINY:
            weights = identity.of_model(settings.model, settings.revision, self.note)
            made_from["actor_config.model"] = [settings.model, weights]
        return made_from

    def _folder(self, key: str, folder: Path) -> dict[str, Any]:
        """What another stage left: weights, tokenizer and template."""
        parts = [identity.of_model(str(folder), None, self.note), identity.of_tokenizer(str(folder))]
        return {key: [str(folder), identity.of_values(parts)]}

    def _template(self, key: str, name: str) -> dict[str, Any]:
        if is_own(name):
            return {}  # it is among the tokenizer's files
        template = get_template(name, key, folder=self.config.base_dir, day=self.config.day)
        return {key: [name, identity.of_text(template.source)]}

    def _training(self, section: str) -> dict[str, Any]:
        """Adapters and DeepSpeed's settings, where they are used."""
        made_from = self._adapters(section) if getattr(self.config, section).peft_enable else {}
        if getattr(self.config, section).deepspeed_enable:
            settings, path = read_deepspeed_config(self.config, section)
            made_from[f"{section}.deepspeed_config_path"] = [str(path), identity.of_values(settings)]
        return made_from

    def _adapters(self, section: str) -> dict[str, Any]:
        key = f"{section}.peft_config_path"
        adapters = load_peft_config(self.config, section).model_dump(mode="json")
        return {key: [getattr(self.config, section).peft_config_path, identity.of_values(adapters)]}
