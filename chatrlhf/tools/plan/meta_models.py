"""The models that a configuration names, on fake tensors: their modules, without weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from chatrlhf.compat import own_parameters
from chatrlhf.config.load import load_peft_config
from chatrlhf.config.model import PeftConfig, QuantizationKeys
from chatrlhf.config.schema import Config
from chatrlhf.data.inputs import corpus
from chatrlhf.errors import ConfigError, MissingError
from chatrlhf.models.loading.backbone import backbone_of, is_encoder_decoder, language_model_class
from chatrlhf.models.loading.lora import add_adapters, bare_name, with_adapters
from chatrlhf.models.loading.pretrained import read_model_config
from chatrlhf.models.loading.rope import stretch_positions
from chatrlhf.models.loading.tiny import TINY, tiny_model
from chatrlhf.models.loading.tokenizer import train_tokenizer
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.traits import traits_of
from chatrlhf.runtime.device import resolve_precision, resolve_rl_precision
from chatrlhf.tools.plan.fake_run import FakeDevice
from chatrlhf.tools.plan.published_shapes import FOLDER, has_shape, shape_settings
from chatrlhf.tools.plan.quantized_linear import quantize_linears

META = torch.device("meta")
CAPPED = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # a head that is more than one product
# Backbones whose first token sees all. A run tries that out; without weights there is nothing to try.
BIDIRECTIONAL = {"bert", "roberta", "xlm-roberta", "deberta", "deberta-v2", "electra", "albert", "modernbert"}


@dataclass
class Models:
    """Draws the models of one configuration; what it had to take for granted is noted once."""

    config: Config
    fake_device: FakeDevice
    notes: list[str] = field(default_factory=list)

    def settings(self, name: str, key: str, section: Any = None) -> Any:
        """A model's configuration; where it is not available, one with the dimensions that the package knows.

        Raises:
            MissingError: neither is there.
        """
        try:
            return read_model_config(name, key, section)
        except MissingError:
            if not has_shape(name):
                raise
        note = f"{key}: {name!r} cannot be reached from here; its dimensions are those in {FOLDER}"
        if note not in self.notes:
            self.notes.append(note)
        settings = shape_settings(name)
        if section is not None and section.rope_scaling is not None:
            stretch_positions(settings, section.rope_scaling, f"{key.rpartition('.')[0]}.rope_scaling")
        return settings

    def actor(self) -> nn.Module:
        """As the ACTOR stage trains it: quantized and under adapters, where that is asked for."""
        actor, model = self.config.actor_config, self._language_model()
        if actor.peft_enable:
            self._compress(model, actor, self.in_bf16(actor.precision))
            with META:
                model = with_adapters(model, load_peft_config(self.config), actor.model)
        return self.fake_device.materialize(model)

    def policy(self) -> nn.Module:
        """As RL trains it: whole or by adapters."""
        actor, model = self.config.actor_config, self._language_model()
        if actor.peft_enable:
            self._compress(model, actor, self.rl_in_bf16())
            with META:
                add_adapters(model, load_peft_config(self.config), actor.model)
        return self.fake_device.materialize(model).eval()

    def actor_is_paired(self) -> bool:
        """Whether the actor is an encoder–decoder."""
        actor = self.config.actor_config
        return actor.model != TINY and is_encoder_decoder(self.settings(actor.model, "actor_config.model", actor))

    def reward_model(self) -> RewardModel:
        """As the REWARD stage trains it."""
        reward, name = self.config.reward_config, self.config.reward_config.model
        if name in ("actor", TINY):
            backbone = backbone_of(self._language_model() if name == "actor" else self._tiny())
        else:
            backbone = self._drawn(AutoModel, self.settings(name, "reward_config.model", reward), reward)
        backbone.requires_grad_(True)
        if reward.peft_enable:
            self._compress(backbone, reward, self.in_bf16(reward.precision))
            with META:
                add_adapters(backbone, load_peft_config(self.config, "reward_config"), str(name))
        elif reward.froze_embeddings:
            backbone.get_input_embeddings().requires_grad_(False)
        head = self.head(backbone, reward.model_head_hidden_size)
        return RewardModel(self.fake_device.materialize(backbone), head, pooling_of(backbone.config))

    def backbone(self, name: str, key: str) -> nn.Module:
        """A model without a head, whole."""
        return self.fake_device.materialize(self._drawn(AutoModel, self.settings(name, key), None))

    def like(self, backbone: nn.Module) -> nn.Module:
        """Another of the same build, with whole weights of its own."""
        return self.fake_device.materialize(self._drawn(AutoModel, backbone.config, None))

    def on_base(self, backbone: nn.Module, adapters: PeftConfig, keys: QuantizationKeys) -> nn.Module:
        """Another on the same weights, trained by adapters of its own.

        Args:
            keys: how the weights are.
        """
        model = self._drawn(AutoModel, backbone.config, None)
        self._compress(model, keys, self.rl_in_bf16())
        with META:
            add_adapters(model, adapters, "")
        model = self.fake_device.materialize(model)
        shared = {bare_name(name): each for name, each in backbone.named_parameters()}
        for name, module in model.named_modules():
            for own, each in list(own_parameters(module).items()):
                known = shared.get(bare_name(f"{name}.{own}"))
                if each is not None and known is not None and known.shape == each.shape and not each.requires_grad:
                    own_parameters(module)[own] = known
        return model

    def head(self, backbone: nn.Module, mlp_size: int | None) -> ScalarHead:
        """What makes one number of a model's states."""
        with META:
            head = ScalarHead(state_size(backbone), mlp_size)
        return self.fake_device.materialize(head)

    def in_bf16(self, precision: str) -> bool:
        """Whether a stage on TRL's trainers computes in bfloat16 there."""
        if precision == "auto" and self.fake_device.device.type == "cuda":
            return self.fake_device.has_bf16
        return resolve_precision(precision, self.fake_device.device) == "bf16"

    def rl_in_bf16(self) -> bool:
        """Whether RL does."""
        precision = self.config.trainer_config.precision
        if precision == "auto" and self.fake_device.device.type == "cuda":
            return self.fake_device.has_bf16
        return resolve_rl_precision(precision, self.fake_device.device) == "bf16"

    def _language_model(self) -> nn.Module:
        actor = self.config.actor_config
        if actor.model == TINY:
            model = self._tiny()
        else:
            settings = self.settings(actor.model, "actor_config.model", actor)
            try:
                model = self._drawn(language_model_class(settings), settings, actor)
            except ValueError as error:
                reason = str(error).splitlines()[0]
                raise ConfigError(f"actor_config.model: {actor.model!r} is no language model ({reason})") from None
        if actor.froze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        text = model.config.get_text_config()
        traits_of(model).head_is_plain = not any(getattr(text, name, None) for name in CAPPED)
        return model

    def _tiny(self) -> nn.Module:
        actor = self.config.actor_config
        tokenizer = train_tokenizer(corpus(self.config), actor.tiny.vocab_size)
        with META:
            return tiny_model(actor.tiny, tokenizer, actor.rope_scaling)

    def _drawn(self, auto: Any, settings: Any, section: Any) -> nn.Module:
        kwargs = {"trust_remote_code": self.config.actor_config.trust_remote_code}
        attention = getattr(section, "attn_implementation", None)
        if attention is not None:  # flash-attn keeps what PyTorch's fused attention keeps
            kwargs["attn_implementation"] = "eager" if attention == "eager" else "sdpa"
        with META:
            return auto.from_config(settings, dtype=torch.float32, **kwargs)

    def _compress(self, model: nn.Module, keys: QuantizationKeys, bf16: bool) -> None:
        if keys.is_quantized:
            named = keys.bnb_4bit_compute_dtype
            computes = getattr(torch, named) if named else torch.bfloat16 if bf16 else torch.float32
            with META:
                quantize_linears(model, keys, computes)


def pooling_of(settings: Any) -> str:
    """As `pooling_for` has it of a backbone in earnest."""
    if is_encoder_decoder(settings):
        return "start"
    return "first" if settings.model_type in BIDIRECTIONAL else "last"
