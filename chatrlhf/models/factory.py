"""Models by name: made on the spot (`tiny`), from a folder, or from the hub."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chatrlhf.config.rope import RopeScaling
from chatrlhf.config.schema import ActorConfig, Config, CriticConfig, RewardConfig, TinyConfig
from chatrlhf.data.collate import Encoder
from chatrlhf.data.templates import Template, get_template
from chatrlhf.errors import ConfigError
from chatrlhf.models.adapters import base_of, config_of, go_on_with_adapters, has_adapters, merged, whole_copy
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.quantization import quantization_of
from chatrlhf.models.reference import copy_of_trained
from chatrlhf.models.reward_model import SETTINGS, RewardModel, RewardScorer, load_reward_model
from chatrlhf.models.rope import positions, stretch_positions
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import is_causal
from chatrlhf.models.tokenizer import load_tokenizer, same_tokenizer, train_tokenizer
from chatrlhf.models.topology import PolicyOnly, SeparateCritic, SharedTrunk

TINY = "tiny"
ALL_BLOCKS = -1  # of `trainer_config.num_layers_unfrozen`


def load_actor(
    config: ActorConfig, texts: list[str], device: torch.device, in_few_bits: bool = False
) -> tuple[nn.Module, Any]:
    """The model that `actor_config.model` names, in float32, and its tokenizer.

    Args:
        texts: what the tokenizer of `model: tiny` is trained on.
        in_few_bits: load it as `load_in_4bit` and `load_in_8bit` say.

    Raises:
        ConfigError: it cannot be loaded; the reason is given.
    """
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        model = tiny_model(config.tiny, tokenizer, config.rope_scaling)
    else:
        model = _language_model(config.model, "actor_config.model", config, in_few_bits)
        _check_vocabulary(model, tokenizer, "actor_config")
    if config.froze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    # What lies in few bits was put in its place when it was loaded, and cannot be moved.
    return model if getattr(model, "is_quantized", False) else model.to(device), tokenizer


def tokenizer_and_settings(config: ActorConfig, texts: list[str]) -> tuple[Any, Any]:
    """The actor's tokenizer and its model's configuration, without reading weights."""
    tokenizer = _actor_tokenizer(config, texts)
    if config.model == TINY:
        return tokenizer, _tiny_config(config.tiny, tokenizer, config.rope_scaling)
    return tokenizer, read_model_config(config.model, "actor_config.model", config)


def read_model_config(name: str, key: str, section: ActorConfig | RewardConfig | None = None) -> Any:
    """A model's configuration file (of adapters their base's), its positions stretched as the section asks.

    Raises:
        ConfigError: there is none, or nothing in it to stretch; it names the key.
    """
    place = config_of(name)
    settings = _explained(key, place, lambda: AutoConfig.from_pretrained(place, **_hub_kwargs(section)))
    if section is not None and section.rope_scaling is not None:
        stretch_positions(settings, section.rope_scaling, f"{key.rpartition('.')[0]}.rope_scaling")
    return settings


def load_policy(folder: Path, device: torch.device, apart: bool = False) -> tuple[nn.Module, Any, Template | None]:
    """A policy that a stage left behind: model in float32, tokenizer, template.

    Args:
        apart: adapters stay adapters, and are trained on; otherwise they are merged into the weights.
    """
    if apart and base_of(str(folder)) is not None:
        model = _base_model(str(folder), "actor_config.model")
        go_on_with_adapters(model, folder)
    else:
        model = _language_model(str(folder), "actor_config.model")
    return model.to(device), load_tokenizer(str(folder), "actor_config.model"), Template.load(folder)


def new_reward_model(whole: Config, actor_folder: Path | None, texts: list[str], device: torch.device) -> RewardScorer:
    """A reward model ready to be trained: the backbone of `reward_config.model` under a fresh head.

    Args:
        whole: what its reward_config leaves open is the actor's.
        actor_folder: the fine-tuned actor, for `model: actor`; None where there is none, and then the actor's
            own starting point is taken.
        texts: what the tokenizer of `model: tiny` is trained on.
    """
    config, actor = whole.reward_config, whole.actor_config
    name, key = config.model, "reward_config.model"
    template = None
    if name == "actor" and actor_folder is not None:
        backbone, tokenizer = _backbone(str(actor_folder), key), load_tokenizer(str(actor_folder), key)
        if config.template is None:
            template = Template.load(actor_folder)
    elif name in ("actor", TINY):
        start = actor if name == "actor" else actor.model_copy(update={"model": TINY})
        policy, tokenizer = load_actor(start, texts, device)
        backbone = policy.base_model
    else:
        backbone = _backbone(name, key, config)
        tokenizer = load_tokenizer(config.tokenizer_path or name, "reward_config.tokenizer_path", **_hub_kwargs(config))
        _check_vocabulary(backbone, tokenizer, "reward_config")
    pooling = "last" if is_causal(backbone) else "first"
    head = ScalarHead(state_size(backbone), config.model_head_hidden_size)
    max_length = min(config.max_sequence_length, context_length(backbone))
    model = RewardModel(backbone, head, pooling).to(device)
    if template is None:
        name = config.template or actor.template
        template = get_template(name, "reward_config.template", tokenizer, whole.base_dir)
    return RewardScorer(model, Encoder.of(tokenizer, template, max_length))


def trained_reward_model(folder: Path, config: RewardConfig, device: torch.device) -> RewardScorer:
    """The reward model of an earlier REWARD stage, or the folder that `reward_config.model` names."""
    return load_reward_model(require_reward_model(folder, config), device)


def require_reward_model(folder: Path, config: RewardConfig) -> Path:
    """The folder of `trained_reward_model`. Raises ConfigError where there is none."""
    if config.model and (Path(config.model) / SETTINGS).exists():
        return Path(config.model)  # named outright
    if (folder / SETTINGS).exists():
        return folder
    raise ConfigError(
        f"no reward model in {folder} and none in reward_config.model ({config.model}); run --type REWARD first, "
        "or set reward_config.reward_fn"
    )


def make_topology(
    policy: nn.Module,
    tokenizer: Any,
    reward: RewardScorer | None,
    config: CriticConfig,
    distribution: Any,
    needs_critic: bool,
    reward_name: str | None = None,
    unfrozen: int = ALL_BLOCKS,
) -> tuple[PolicyOnly, str]:
    """The topology that the configuration asks for, and one line that says where the critic starts from.

    A critic starts from the reward model only where that is causal, of the policy's kind and has its
    tokenizer: then it already knows what a good prefix looks like. Otherwise it starts from a copy of the
    policy under a head that predicts 0.

    Args:
        reward: the trained reward model, None where a function gives the reward.
        reward_name: `reward_config.model`. A critic of that name means the trained reward model, as in ChatLLaMA.
        unfrozen: `trainer_config.num_layers_unfrozen`, blocks of the policy that are trained.

    Raises:
        ConfigError: a critic that is named cannot be one, or the policy's blocks cannot be parted like that.
    """
    if unfrozen == ALL_BLOCKS:
        return _with_critic(policy, tokenizer, reward, config, distribution, needs_critic, reward_name)
    freeze_trunk(policy, unfrozen)
    inner, line = _with_critic(policy, tokenizer, reward, config, distribution, needs_critic, reward_name)
    return FrozenTrunk(inner, unfrozen), f"{line}; all but the top {unfrozen} blocks are frozen and shared"


def _with_critic(
    policy: nn.Module,
    tokenizer: Any,
    reward: RewardScorer | None,
    config: CriticConfig,
    distribution: Any,
    needs_critic: bool,
    reward_name: str | None,
) -> tuple[PolicyOnly, str]:
    """The policy and its value function, and where that starts from."""
    if not needs_critic:
        return PolicyOnly(policy, distribution), "no critic: this algorithm compares samples of one prompt"
    device = next(policy.parameters()).device
    mlp = config.model_head_hidden_size
    hidden = state_size(policy)
    if config.model == "shared":
        head = ScalarHead(hidden, mlp).zero_().to(device)
        return SharedTrunk(policy, head, distribution), "critic: a value head on the policy's trunk, starting at 0"
    if config.model is None or (config.model == reward_name and reward is not None):
        reason = _why_not_from(reward, policy, tokenizer)
        if reason is not None and config.model is not None:
            raise ConfigError(f"critic_config.model: {config.model!r} cannot be the critic: {reason}")
        if reason is None:
            head = copy.deepcopy(reward.model.head).fold_(reward.model.scale, reward.model.shift)
            backbone = copy.deepcopy(reward.model.backbone).requires_grad_(True)
            return SeparateCritic(policy, backbone, head, distribution), "critic: starts from the reward model"
        head = ScalarHead(hidden, mlp).zero_().to(device)
        start = whole_copy(policy.base_model) if has_adapters(policy) else copy_of_trained(policy.base_model)
        critic = SeparateCritic(policy, start, head, distribution)
        return critic, f"critic: a copy of the policy under a zero head ({reason})"
    folder = Path(config.model)
    if (folder / SETTINGS).exists():
        named = load_reward_model(folder, device)
        reason = _why_not_from(named, policy, tokenizer)
        if reason is not None:
            raise ConfigError(f"critic_config.model: {config.model!r} cannot be the critic: {reason}")
        head = named.model.head.fold_(named.model.scale, named.model.shift)
        backbone = named.model.backbone
    else:
        backbone = _backbone(config.model, "critic_config.model").to(device)
        if not is_causal(backbone):
            raise ConfigError(f"critic_config.model: {config.model!r} is not causal, so it has no value before a token")
        if not same_tokenizer(tokenizer, load_tokenizer(config.model, "critic_config.model")):
            raise ConfigError(f"critic_config.model: {config.model!r} has another tokenizer than the actor")
        head = ScalarHead(state_size(backbone), mlp).zero_().to(device)
    return SeparateCritic(policy, backbone, head, distribution), f"critic: {config.model}"


def context_length(model: nn.Module) -> int:
    """Positions a model can take; a large number for models without a bound (ALiBi)."""
    return positions(model.config)


def fingerprint(model: nn.Module) -> str:
    """A short hash of all parameters' names, shapes and which are frozen: equal for models that can exchange states."""
    shapes = sorted(
        (name, list(parameter.shape) + ([] if parameter.requires_grad else ["frozen"]))
        for name, parameter in model.named_parameters()
    )
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]


def parameter_count(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def trained_count(model: nn.Module) -> int:
    """Parameters that are trained, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def block_count(config: ActorConfig) -> int:
    """Blocks of the actor, without reading weights."""
    if config.model == TINY:
        return config.tiny.num_hidden_layers
    settings = read_model_config(config.model, "actor_config.model", config).get_text_config()
    return int(settings.num_hidden_layers)


def tiny_model(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None = None) -> nn.Module:
    """A small Llama for a tokenizer, with random weights from torch's generator."""
    return LlamaForCausalLM(_tiny_config(config, tokenizer, scaling))


def meta_model(name: str, key: str, config: ActorConfig | RewardConfig) -> nn.Module:
    """A model's modules without weights, from its configuration file alone."""
    settings = read_model_config(name, key, config)
    trust = {"trust_remote_code": config.trust_remote_code}
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(settings, **trust)
        except ValueError:  # not a causal language model: an encoder as reward model
            return AutoModel.from_config(settings, **trust)


def _tiny_config(config: TinyConfig, tokenizer: Any, scaling: RopeScaling | None) -> LlamaConfig:
    intermediate = config.intermediate_size or -(-config.hidden_size * 8 // 3 // 32) * 32
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=intermediate,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=config.initializer_range,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    if scaling is not None:
        stretch_positions(settings, scaling, "actor_config.rope_scaling")
    return settings


def _why_not_from(reward: RewardScorer | None, policy: nn.Module, tokenizer: Any) -> str | None:
    if reward is None:
        return "the reward is not a model"
    if reward.model.pooling != "last":
        return "the reward model is not causal"
    if reward.model.config.model_type != policy.config.model_type:
        return f"the reward model is a {reward.model.config.model_type}, the policy a {policy.config.model_type}"
    if not same_tokenizer(tokenizer, reward.tokenizer):
        return "the reward model has another tokenizer"
    return None


def _actor_tokenizer(config: ActorConfig, texts: list[str]) -> Any:
    key = "actor_config.tokenizer_path"
    if config.model == TINY and config.tokenizer_path is None:
        return train_tokenizer(texts, config.tiny.vocab_size)
    name, kwargs = config.tokenizer_path or config.model, _hub_kwargs(config)
    return load_tokenizer(name, key, **kwargs)


def _hub_kwargs(config: ActorConfig | RewardConfig | None) -> dict[str, Any]:
    if config is None:
        return {}
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    return kwargs | ({"revision": config.revision} if config.revision else {})


def _backbone(name: str, key: str, section: ActorConfig | RewardConfig | None = None) -> nn.Module:
    if base_of(name) is not None:
        return _language_model(name, key, section).base_model
    return _from_pretrained(AutoModel, name, key, read_model_config(name, key, section), section)


def _language_model(
    name: str, key: str, section: ActorConfig | RewardConfig | None = None, in_few_bits: bool = False
) -> nn.Module:
    if base_of(name) is not None:
        return merged(_base_model(name, key, section), name)
    quantization = quantization_of(section, section.precision) if in_few_bits else {}
    settings = read_model_config(name, key, section)
    return _from_pretrained(AutoModelForCausalLM, name, key, settings, section, quantization)


def _base_model(name: str, key: str, section: ActorConfig | RewardConfig | None = None) -> nn.Module:
    """What the adapters in a folder belong to, with the positions that it had then."""
    base = str(base_of(name))
    if base_of(base) is not None:
        return _language_model(base, key, section)
    return _from_pretrained(AutoModelForCausalLM, base, key, read_model_config(name, key, section), section)


def _from_pretrained(
    auto: Any,
    name: str,
    key: str,
    settings: Any,
    section: ActorConfig | RewardConfig | None,
    quantization: dict[str, Any] | None = None,
) -> nn.Module:
    """A model made by the given configuration, in float32 but for what lies in few bits."""
    kwargs = {"config": settings, **_hub_kwargs(section), **(quantization or {})}
    return _explained(key, name, lambda: auto.from_pretrained(name, dtype=torch.float32, **kwargs))


def _explained(key: str, name: str, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, or an error that names the key."""
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        if (Path(name) / "consolidated.00.pth").exists():
            raise ConfigError(
                f"{key}: {name!r} holds Meta's original LLaMA files; convert them first with transformers' "
                "convert_llama_weights_to_hf.py"
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "a folder without a usable model" if Path(name).is_dir() else "no folder here and not on the hub"
        raise ConfigError(f"{key}: {name!r} cannot be loaded, it is {kind} ({reason})") from None


def _check_vocabulary(model: nn.Module, tokenizer: Any, section: str) -> None:
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ConfigError(
            f"{section}: the tokenizer has {len(tokenizer)} tokens but the model only {rows} embeddings; "
            "name the tokenizer that belongs to the model"
        )
