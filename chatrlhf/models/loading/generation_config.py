"""generation_config.json of a policy: checked when the model is loaded, and made such that it can be saved again.

transformers loads files that it refuses to save (Vicuna's and Llama-2-chat's give a temperature without do_sample): a
run would end with an error at its first checkpoint. Rollouts do not use any of it: they are sampled from
`SamplingDistribution`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from chatrlhf.data.encoder import Encoder
from chatrlhf.errors import ConfigError
from chatrlhf.models.stop_tokens import StopTokens, stop_tokens, write_stop_tokens

# Of these transformers says that they need do_sample.
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
FLAG = re.compile(r"^- `(\w+)`: ", re.MULTILINE)  # in its error


def check_generation_config(name: str, key: str, revision: str | None = None) -> None:
    """Refuse a generation_config.json that cannot be used.

    transformers passes over one that is no JSON, and stops at others without naming the file.

    Args:
        name: a folder or hub id, of which the revision is meant.

    Raises:
        ConfigError: it is no JSON object, or its settings contradict each other.
    """
    path = Path(name) / GENERATION_CONFIG_NAME
    if path.is_symlink() and not path.exists():
        raise ConfigError(f"{key}: {path} is a link that leads nowhere; restore the file, or remove the link")
    try:
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings, dict):
                raise TypeError(f"expected a JSON object, got {type(settings).__name__}")
            GenerationConfig.from_dict(settings)
        elif not Path(name).is_dir():
            GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:  # a hub id without one
        return
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{key}: {GENERATION_CONFIG_NAME} of {name!r} cannot be used ({_first_line(error)}); correct that file, or "
            "remove it"
        ) from None


def adopt_generation_config(model: nn.Module, adapters: Path) -> None:
    """Give the base of a folder's adapters the generation_config.json that lies beside them, if there is one."""
    if (adapters / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(adapters)


def settle_generation_config(model: nn.Module, encoder: Encoder, *own_eos: int) -> list[str]:
    """Decide what ends a reply of this policy, note it in its configurations, and make sure that they can be saved.

    Args:
        encoder: makes the rows that the policy is trained on.
        own_eos: the tokenizer's EOS before the template gave it another.

    Returns:
        What was changed, in lines for people.

    Raises:
        ConfigError: the configuration cannot be saved.
    """
    ends = stop_tokens(model, encoder.tokenizer, *own_eos, inside=encoder.ids_inside_replies)
    write_stop_tokens(model, ends.ids)
    return [*make_savable(model), *notes_of(ends)]


def notes_of(ends: StopTokens) -> list[str]:
    """Lines about EOS ids of a model's files that end no reply."""
    if not ends.left_out:
        return []
    return [f"eos_token_id of the model's files: left out, since they end no reply: {', '.join(ends.left_out)}"]


def make_savable(model: nn.Module) -> list[str]:
    """Change what transformers refuses to save in a model's generation config.

    Sampling flags without a word on ``do_sample`` turn it on, as the authors of such files did later. All other flags
    that transformers refuses have no effect; they are removed.

    Returns:
        What was changed, in lines for people.

    Raises:
        ConfigError: something else is wrong.
    """
    config, changes = model.generation_config, []
    refused = _refused(config)
    if SAMPLING.intersection(refused) and _may_sample(config):
        given = ", ".join(f"{flag} {getattr(config, flag)}" for flag in refused if flag in SAMPLING)
        config.do_sample = True
        changes.append(f"do_sample is set to true, since {given} is given")
        refused = _refused(config)
    for flag in refused:
        changes.append(f"{flag} {getattr(config, flag)} has no effect and is removed")
        setattr(config, flag, None)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ConfigError(
            f"{GENERATION_CONFIG_NAME} of {model.name_or_path!r} cannot be saved again ({_first_line(error)}); correct "
            "that file"
        ) from None
    return [f"{GENERATION_CONFIG_NAME}, which transformers would not save: {'; '.join(changes)}"] if changes else []


def _may_sample(config: GenerationConfig) -> bool:
    """Whether nothing in the file asks for another kind of decoding."""
    temperature = 1.0 if config.temperature is None else config.temperature
    is_hot = isinstance(temperature, (int, float)) and temperature > 0  # 0 means greedy decoding
    return config.do_sample is None and is_hot and config.num_beams in (None, 1)


def _refused(config: GenerationConfig) -> list[str]:
    """Flags that keep a configuration from being saved, as transformers names them."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return FLAG.findall(str(error))
    return []


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if "is invalid" not in line]
    return lines[0].removeprefix("- ") if lines else type(error).__name__
