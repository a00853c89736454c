"""EOS ids: the tokens that end a reply, by tokenizer, chat template, config.json and generation_config.json together.

Published models name several: Llama-3 <|end_of_text|>, <|eom_id|> and <|eot_id|>, Qwen <|im_end|> and <|endoftext|>.
Rollouts, scores and saved folders all ask here, so that training ends a reply where `generate()` will.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from chatrlhf.errors import ConfigError


@dataclass(frozen=True)
class StopTokens:
    """The EOS ids of a model, and what its files name besides."""

    ids: tuple[int, ...]  # the one that replies are trained to end with comes first
    left_out: tuple[str, ...]  # ids that its files name and that end no reply here, each with the reason


def stop_tokens(model: nn.Module, tokenizer: Any, *more: int, inside: Collection[int] = ()) -> StopTokens:
    """The ids that end a reply of a language model.

    The tokenizer's EOS always does. Of the others those do that no reply can hold: control tokens of the vocabulary
    which the template does not put into a reply.

    Args:
        tokenizer: its EOS is the token that replies are trained to end with.
        more: further ids, such as the EOS that the tokenizer had before the template gave it another.
        inside: ids that stand inside a reply, before its end.
    """
    rows, control = vocabulary_rows(model), tokenizer.added_tokens_decoder
    ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    seen, left_out = list(ids), []
    for each in [*more, *_named(model.generation_config), *_named(model.config)]:
        if each in seen:
            continue
        seen.append(each)
        if not isinstance(each, int) or not 0 <= each < rows:
            left_out.append(f"{each!r} (the model has the ids 0 to {rows - 1})")
        elif each not in control:
            left_out.append(f"{each} ({_shown(tokenizer, each)}, which a reply may hold)")
        elif each in inside:
            left_out.append(f"{each} ({_shown(tokenizer, each)}, which the template puts inside a reply)")
        else:
            ids.append(each)
    return StopTokens(tuple(ids), tuple(left_out))


def write_stop_tokens(model: nn.Module, ids: tuple[int, ...]) -> None:
    """Make a model's configurations name these EOS ids, so that `generate()` of its saved folder ends with them."""
    if ids:
        model.generation_config.eos_token_id = ids[0] if len(ids) == 1 else list(ids)
        model.config.eos_token_id = ids[0]


def ids_in_generation_config(model: nn.Module) -> set[int]:
    """EOS ids of the generation_config.json beside a model's weights, or its config.json, as others read them."""
    name = model.name_or_path
    try:
        config = GenerationConfig.from_pretrained(name)
    except OSError:
        config = GenerationConfig.from_pretrained(name, config_file_name="config.json", _from_model_config=True)
    return set(_named(config))


def vocabulary_rows(model: nn.Module) -> int:
    """Ids that a language model gives logits for."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.get_text_config().vocab_size)


def ids_without_token(tokenizer: Any, rows: int) -> tuple[int, ...]:
    """Ids below ``rows`` that are no token: padding of the head (Qwen, Pythia), or holes in the vocabulary."""
    ids = {*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder}
    unknown = torch.ones(rows, dtype=torch.bool)
    unknown[[each for each in ids if each < rows]] = False
    return tuple(unknown.nonzero().flatten().tolist())


def refuse_unknown_ids(gen: Any, rows: int) -> None:
    """A ConfigError where `gen_kwargs` names ids that a model of so many ids does not have."""
    ends = gen.eos_token_id if isinstance(gen.eos_token_id, list) else [gen.eos_token_id]
    for key, ids in (("eos_token_id", ends), ("forbidden_tokens", gen.forbidden_tokens)):
        wrong = [each for each in ids if each is not None and not 0 <= each < rows]
        if wrong:
            raise ConfigError(
                f"trainer_config.gen_kwargs.{key}: the model has the ids 0 to {rows - 1}, got {wrong[0]}; correct it"
            )


def _named(config: Any) -> list[Any]:
    """What a configuration says of EOS: nothing, an id or several."""
    ids = getattr(config, "eos_token_id", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = getattr(text, "eos_token_id", None) if ids is None else ids
    return [each for each in (ids if isinstance(ids, (list, tuple)) else [ids]) if each is not None]


def _shown(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([token]))
