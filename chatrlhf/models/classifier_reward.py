"""A sequence classifier as a reward model: its own head on its own pooling, exact for every family."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from chatrlhf.models.loading.backbone import is_encoder_decoder
from chatrlhf.models.loading.rope import positions, turns_by_length
from chatrlhf.models.loading.sequence_classifier import head_modules
from chatrlhf.models.reward_network import RewardModel
from chatrlhf.models.scalar_head import ScalarHead, state_size
from chatrlhf.models.sequences import is_causal

LENGTHS = (9, 3, 6, 9, 2)  # of the rows that a classifier is tried on


def reward_model_of(classifier: nn.Module) -> RewardModel:
    """A reward model that gives each row the classifier's score of that row alone, in a batch or not.

    A linear head on the last token of a causal model becomes a `ScalarHead` on its backbone. Any other classifier is
    called as it is: each family has its own pooling (a pooler on the first token, a mean, the last EOS).
    transformers finds the last token by its id, so the reward model has to skip what the classifier skips.

    Args:
        classifier: one label; adapters may be in it.
    """
    alone = _alone(classifier)
    head = _linear_head(classifier)
    if head is not None and is_causal(classifier.base_model):
        skipped = classifier.config.get_text_config().pad_token_id
        model = RewardModel(classifier.base_model, head, "last", skipped=skipped)
        if _batch_matches(model, alone):
            return _by_rows_where_needed(model)
    model = RewardModel(classifier, None, "own")
    model.takes_padding = _batch_matches(model, alone)
    return _by_rows_where_needed(model)


def _linear_head(classifier: nn.Module) -> ScalarHead | None:
    """The head of a classifier where it is one linear layer on its backbone's states."""
    heads = list(head_modules(classifier).values())
    if len(heads) != 1 or not isinstance(heads[0], nn.Linear) or is_encoder_decoder(classifier.config):
        return None
    linear = heads[0]
    return ScalarHead.of(linear) if linear.in_features == state_size(classifier) else None


def _trial_rows(classifier: nn.Module) -> list[list[int]]:
    """Rows of several lengths, each closed by EOS where the model knows one, without other special tokens."""
    config = classifier.config.get_text_config()
    size = min(config.vocab_size, classifier.get_input_embeddings().weight.shape[0])
    special = {config.pad_token_id, config.bos_token_id, *_as_list(config.eos_token_id)}
    plain = [i for i in range(size) if i not in special] or [0]
    closing = [i for i in _as_list(config.eos_token_id)[:1] if i < size]
    rows = [[plain[(3 + 7 * i + 5 * row) % len(plain)] for i in range(n)] for row, n in enumerate(LENGTHS)]
    return [(row + closing)[-positions(config) :] for row in rows]


@torch.no_grad()
def _alone(classifier: nn.Module) -> list[tuple[list[int], float]]:
    """The trial rows, each with the classifier's score of it in a batch of its own."""
    training, device = classifier.training, next(classifier.parameters()).device
    classifier.eval()
    scores = []
    for row in _trial_rows(classifier):
        ids = torch.tensor([row], device=device)
        scores.append((row, classifier(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0].item()))
    classifier.train(training)
    return scores


@torch.no_grad()
def _batch_matches(model: RewardModel, alone: list[tuple[list[int], float]]) -> bool:
    """Whether a reward model gives the trial rows in one padded batch the scores that they have alone."""
    rows, expected = [row for row, _ in alone], torch.tensor([score for _, score in alone])
    training, weight = model.training, next(model.parameters())
    model.eval()
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=weight.device)
    mask = (
        torch.arange(width, device=weight.device) < torch.tensor([len(row) for row in rows]).to(weight.device)[:, None]
    )
    try:
        found = model.raw(ids, mask).float().cpu()
    except ValueError:  # no batch without a pad token, or none of rows with several numbers of EOS tokens
        return False
    finally:
        model.train(training)
    return bool((found - expected).abs().max() <= 1e-4 * expected.abs().max())


def _by_rows_where_needed(model: RewardModel) -> RewardModel:
    """A row's score must not depend on the longest row of its batch, which the trial rows are too short to show."""
    config = model.config.get_text_config()
    if turns_by_length(config) or getattr(config, "attention_type", None) == "block_sparse":
        model.takes_padding = False
    return model


def _as_list(ids: Any) -> list[int]:
    return [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
