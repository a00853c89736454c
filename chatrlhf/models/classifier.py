"""Reward models that others trained: sequence classifiers with one label, used as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chatrlhf.config.schema import RewardConfig
from chatrlhf.device import pick_device
from chatrlhf.errors import ConfigError
from chatrlhf.models.loading import hub_kwargs, read_model_config
from chatrlhf.models.loading_report import load_pretrained
from chatrlhf.models.reward_model import SETTINGS
from chatrlhf.models.sizes import context_length
from chatrlhf.models.tiny import TINY

KEY = "reward_config.model"
BATCH = 64


class Classifier:
    """A reward function: ``(prompts, completions) -> scores``.

    An encoder (OpenAssistant's DeBERTa, for one) is given prompt and completion as a pair of texts, by its own
    tokenizer and its own special tokens. A causal model is given them as the two turns of its chat template where it
    has one, and otherwise one behind the other.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, max_length: int) -> None:
        self.model, self.tokenizer, self.max_length = model.eval().requires_grad_(False), tokenizer, max_length
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
        # Causal ones are read at the last token that is no padding, which they find by its id.
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.padding_side, tokenizer.truncation_side = "right", "left"

    @torch.no_grad()
    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        device = next(self.model.parameters()).device
        scores: list[float] = [0.0] * len(prompts)
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(completions[i]))
        for start in range(0, len(by_length), BATCH):
            rows = by_length[start : start + BATCH]
            inputs = self._encoded([prompts[i] for i in rows], [completions[i] for i in rows]).to(device)
            for i, score in zip(rows, self.model(**inputs).logits[:, 0].float().tolist(), strict=True):
                scores[i] = score
        return scores

    def _encoded(self, prompts: list[str], completions: list[str]) -> Any:
        options = {"padding": True, "truncation": True, "max_length": self.max_length, "return_tensors": "pt"}
        if self.tokenizer.chat_template:
            turns = [
                [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            texts = self.tokenizer.apply_chat_template(turns, tokenize=False)
            return self.tokenizer(texts, add_special_tokens=False, **options)
        if self.tokenizer.sep_token is not None:
            return self.tokenizer(prompts, completions, **options)
        return self.tokenizer([a + b for a, b in zip(prompts, completions, strict=True)], **options)


class LazyClassifier:
    """The one that `reward_config.model` names; its weights are read when it is first asked."""

    def __init__(self, section: RewardConfig) -> None:
        self.section, self.loaded = section, None

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        self.loaded = self.loaded or load_classifier(self.section, pick_device())
        return self.loaded(prompts, completions)


def is_used_as_it_is(section: RewardConfig, stages: list[str], trained: Path) -> bool:
    """Whether the reward is a classifier that nobody trains further: there is nothing to train it on, or no such stage.

    Args:
        trained: folder of the REWARD stage's model, which comes first where it is there.

    Raises:
        ConfigError: it has several labels, and nobody could say which of them is the score.
    """
    if section.model in (None, "actor", TINY):
        return False
    has_data = section.train_dataset_path is not None or bool(section.datasets)
    if ("REWARD" in stages and has_data) or ("REWARD" not in stages and (trained / SETTINGS).exists()):
        return False
    config = read_model_config(section.model, KEY, section)
    if not any(each.endswith("ForSequenceClassification") for each in config.architectures or []):
        return False
    if config.num_labels != 1:
        raise ConfigError(
            f"{KEY}: {section.model!r} is a classifier with {config.num_labels} labels, a reward model has one; name "
            "another, or give the score by reward_config.reward_fn"
        )
    return True


def load_classifier(section: RewardConfig, device: torch.device) -> Classifier:
    """The model and the tokenizer of `reward_config.model`, in float32."""
    kwargs = hub_kwargs(section)
    kind = AutoModelForSequenceClassification
    model = load_pretrained(kind, str(section.model), KEY, dtype=torch.float32, **kwargs).to(device)
    tokenizer = AutoTokenizer.from_pretrained(section.tokenizer_path or section.model, **kwargs)
    return Classifier(model, tokenizer, min(section.max_sequence_length, context_length(model)))
