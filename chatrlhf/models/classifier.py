"""Reward models that others trained: sequence classifiers with one label, used as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from chatrlhf.config.schema import RewardConfig
from chatrlhf.conversation import Prompt
from chatrlhf.data.collate import pad_right
from chatrlhf.data.render_limits import refuse_long, render_limits
from chatrlhf.data.templates import arguments_of
from chatrlhf.data.text_pairs import reads_pairs
from chatrlhf.errors import ConfigError
from chatrlhf.models.classifier_reward import reward_model_of
from chatrlhf.models.loading.model_info import context_length
from chatrlhf.models.loading.pretrained import hub_kwargs
from chatrlhf.models.loading.sequence_classifier import (
    is_classifier,
    load_sequence_classifier,
    refuse_labels,
    require_head,
)
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.reward_model import is_reward_model
from chatrlhf.models.reward_network import RewardModel
from chatrlhf.runtime.device import pick_device

KEY = "reward_config.model"
BATCH = 64


class Classifier:
    """A reward function: ``(prompts, completions) -> scores``, each the model's score of that row alone.

    An encoder (OpenAssistant's DeBERTa, for one) is given prompt and completion as a pair of texts, by its own
    tokenizer and its own special tokens. A causal model is given them as the turns of its chat template where it
    has one, and otherwise one behind the other.
    """

    def __init__(self, model: RewardModel, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model.eval().requires_grad_(False), tokenizer, max_length
        tokenizer.truncation_side = "left"
        self.has_warned = False

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt | str], completions: Sequence[str]) -> list[float]:
        rows = self._rows(prompts, completions)
        device = next(self.model.parameters()).device
        scores: list[float] = [0.0] * len(rows)
        by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
        for start in range(0, len(rows), BATCH):
            chosen = by_length[start : start + BATCH]
            ids, mask = pad_right([rows[i][0] for i in chosen], 0)
            types, _ = pad_right([rows[i][1] for i in chosen], 0)
            # A model without token types must not get any: GPT-2 would embed them as tokens.
            given = types.to(device) if types.any() else None
            for i, score in zip(chosen, self.model.raw(ids.to(device), mask.to(device), given).tolist(), strict=True):
                scores[i] = score
        return scores

    def _rows(self, prompts: Sequence[Prompt | str], completions: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids and token types of each row, within the context."""
        texts = [_texts(self.tokenizer, *row) for row in zip(prompts, completions, strict=True)]
        special = not self.tokenizer.chat_template  # which a chat template writes itself
        rows = [self.tokenizer(*each, add_special_tokens=special) for each in texts]
        cut = [i for i, row in enumerate(rows) if len(row["input_ids"]) > self.max_length]
        for i in cut:
            limit = {"truncation": True, "max_length": self.max_length}
            rows[i] = self.tokenizer(*texts[i], add_special_tokens=special, **limit)
        if cut and not self.has_warned:
            self.has_warned = True
            warnings.warn(
                f"{KEY}: conversations of more than {self.max_length} tokens lose their beginning before they are "
                f"scored ({len(cut)} of the first {len(rows)})",
                stacklevel=2,
            )
        return [(row["input_ids"], row.get("token_type_ids") or [0] * len(row["input_ids"])) for row in rows]


class LazyClassifier:
    """The one that `reward_config.model` names; its weights are read when it is first asked."""

    def __init__(self, section: RewardConfig) -> None:
        self.section, self.loaded = section, None

    def __call__(self, prompts: Sequence[Prompt | str], completions: Sequence[str]) -> list[float]:
        self.loaded = self.loaded or load_classifier(self.section, pick_device())
        return self.loaded(prompts, completions)

    def check(self, prompts: Iterable[Prompt | str]) -> None:
        """Try the tokenizer and its template on a prompt of each shape, without reading weights.

        Raises:
            ConfigError: there is no tokenizer, or its template refuses a shape.
        """
        tokenizer = _tokenizer(self.section)
        shapes = {_shape(prompt): prompt for prompt in map(Prompt.of, prompts)}
        for prompt in shapes.values():
            _texts(tokenizer, prompt, "reply")


def is_used_as_it_is(section: RewardConfig, stages: list[str], trained: Path) -> bool:
    """Whether the reward is a classifier that no one trains further: there is nothing to train it on, or no such stage.

    Args:
        trained: folder of the REWARD stage's model, which comes first where it is there.

    Raises:
        ConfigError: it has several labels, of which none is known to be the score, or no head, or is to lose it.
    """
    if section.model in (None, "actor", TINY) or is_reward_model(section.model):
        return False
    has_data = section.train_dataset_path is not None or bool(section.datasets)
    if ("REWARD" in stages and has_data) or ("REWARD" not in stages and is_reward_model(trained)):
        return False
    if not is_classifier(section.model, KEY, section):
        return False
    if section.fresh_head:
        raise ConfigError(
            "reward_config.fresh_head: True drops the head of a classifier, and there is nothing to train another on; "
            "name data (reward_config.train_dataset_path), or set it to False"
        )
    require_head(section.model, KEY, section)
    refuse_labels(section.model, KEY, "name another, or give the score by reward_config.reward_fn", section)
    return True


def load_classifier(section: RewardConfig, device: torch.device) -> Classifier:
    """The model and the tokenizer of `reward_config.model`, in float32.

    Raises:
        ConfigError: see `load_sequence_classifier`; or it has no tokenizer.
    """
    model = reward_model_of(load_sequence_classifier(str(section.model), KEY, section)).to(device)
    return Classifier(model, _tokenizer(section), min(section.max_sequence_length, context_length(model.backbone)))


def _tokenizer(section: RewardConfig) -> Any:
    name = section.tokenizer_path or section.model
    try:
        return AutoTokenizer.from_pretrained(name, **hub_kwargs(section))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"reward_config.tokenizer_path: no tokenizer could be loaded from {name!r} ({reason})"
        ) from None


def _texts(tokenizer: Any, prompt: Prompt | str, completion: str) -> tuple[str, ...]:
    """One text, or the two of a pair, that a classifier with this tokenizer reads."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        text = Prompt.of(prompt).text
        return (text, completion) if reads_pairs(tokenizer) else (text + completion,)
    # By transformers alone, special tokens in the data too: the score is the one that it gives.
    messages = arguments_of(Prompt.of(prompt), takes_narrative=False, reply=completion)["messages"]
    try:
        with render_limits():
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        refuse_long(text, messages)
        return (text,)
    except (TemplateError, TypeError, ValueError, TimeoutError, MemoryError) as error:
        roles = ", ".join(each["role"] for each in messages)
        raise ConfigError(
            f"{KEY}: the chat template of this classifier cannot render a conversation of the roles {roles} ({error}); "
            "name a tokenizer with another template (reward_config.tokenizer_path), or give the score by "
            "reward_config.reward_fn"
        ) from None


def _shape(prompt: Prompt) -> tuple[Any, ...]:
    return prompt.system is not None or bool(prompt.narrative), tuple(turn.role for turn in prompt.turns)
