"""Checks of the models as their stages load them: weights that no file held, rewards under padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from chatrlhf.config.load import load_peft_config
from chatrlhf.config.schema import ActorConfig, RewardConfig
from chatrlhf.conversation import Prompt
from chatrlhf.data.inputs import corpus
from chatrlhf.data.row_checks import sampled
from chatrlhf.data.stage_rows import Preference
from chatrlhf.models.classifier import LazyClassifier
from chatrlhf.models.for_stages import load_actor, new_reward_model, trained_reward_model
from chatrlhf.models.loading.loading_report import fresh_weights
from chatrlhf.models.loading.model_info import parameter_count, trained_count
from chatrlhf.models.loading.pretrained import read_model_config
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.rl.rewards import DialogueReward
from chatrlhf.runtime.check_result import CheckResult, judged
from chatrlhf.stages.context import with_fresh_adapters
from chatrlhf.stages.data_checks import few_demonstrations, few_prompts
from chatrlhf.tools.check.resources import check_disk
from chatrlhf.tools.check.reward_function import REPLIES, check_padding
from chatrlhf.tools.check.session import Session, same_random_numbers
from chatrlhf.tools.check.training import check_actor_training, check_reward_training

NAMED = 6  # weights that a line names
PADDED_ROWS = 8


def check_actor(session: Session) -> Iterator[CheckResult]:
    """The actor as the ACTOR stage, or RL without it, starts from it."""
    if not {"ACTOR", "RL"} & set(session.stages):
        return
    config, start = session.config.actor_config, session.start()
    folder = None if "ACTOR" in session.stages else session.context().trained("ACTOR", "actor", config.model)
    if folder is not None:
        yield CheckResult("actor fresh weights", "pass", f"none; RL starts from the fine-tuned actor in {folder}")
        return
    with fresh_weights() as fresh, same_random_numbers(session.config.seed):
        model, tokenizer = load_actor(start, corpus(session.config), session.device, config.precision)
        fresh += _added_rows("actor_config.model", start.model, start, tokenizer)
        yield fresh_weights_result("actor fresh weights", start.model, model, fresh, "ACTOR" in session.stages)
        if "ACTOR" not in session.stages:
            return
        model = with_fresh_adapters(session.context(), model, start, "ACTOR", config.gradient_checkpointing)
    yield check_disk(session, "ACTOR", model, config.n_checkpoints_to_keep)
    if session.deep:
        yield from check_actor_training(session, model, tokenizer)


def check_reward_model(session: Session) -> Iterator[CheckResult]:
    """The reward model as REWARD starts from it, or as RL uses it."""
    if session.is_classifier:
        judge = DialogueReward(LazyClassifier(session.config.reward_config), "the classifier")
        yield check_padding("reward model padding", judge.texts, _rows_to_judge(session))
    if session.has_function or not {"REWARD", "RL"} & set(session.stages):
        return
    with fresh_weights() as fresh, same_random_numbers(session.config.seed):
        scorer = judge_of(session)
    if session.trains_reward:
        model, name = scorer.model, session.config.reward_config.model
        if scorer.head_from is None:
            fresh += [f"head.{name}" for name in model.head_weights()]
        if name != "actor":
            key = "reward_config.model"
            fresh += _added_rows(key, str(name), session.config.reward_config, scorer.tokenizer)
        start = str(session.start().model) if name == "actor" else str(name)
        yield fresh_weights_result("reward model fresh weights", start, model, fresh, True)

    def scores(prompts: list[Any], replies: list[str]) -> torch.Tensor:
        return torch.tensor(scorer.score(prompts, replies))

    yield check_padding("reward model padding", scores, _rows_to_judge(session))
    if session.trains_reward:
        yield check_disk(session, "REWARD", scorer.model, session.config.reward_config.n_checkpoints_to_keep)
        if session.deep:
            yield from check_reward_training(session, scorer)


def judge_of(session: Session) -> RewardScorer:
    """The reward model that REWARD starts from, or the trained one where it is not trained in this run."""
    config = session.config.reward_config
    if not session.trains_reward:
        return trained_reward_model(session.config.run_dir / "reward", config, session.device)
    ctx = session.context()
    actor = ctx.trained("ACTOR", "actor", session.config.actor_config.model)
    adapters = load_peft_config(session.config, "reward_config") if config.peft_enable else None
    whole = session.config.model_copy(update={"actor_config": ctx.start()})
    return new_reward_model(whole, actor, corpus(session.config), session.device, adapters)


def fresh_weights_result(
    name: str, start: str, model: nn.Module, fresh: Sequence[str], is_trained: bool
) -> CheckResult:
    """Which weights are drawn at random; a stage that trains them is to follow.

    Args:
        start: what the configuration names.
        fresh: names of tensors that no file holds.
        is_trained: whether the model is trained before it is used.
    """
    count = f"{parameter_count(model):,} parameters ({trained_count(model):,} trained)"
    if start == TINY:
        return judged(
            name,
            f"all {count} are drawn at random, as 'tiny' asks",
            "run --type ACTOR first, or name a model: an untrained actor says nothing that a reward could tell apart",
            warn=not is_trained,
        )
    if not fresh:
        return CheckResult(name, "pass", f"none; all {count} are those of {start}")
    named = ", ".join(fresh[:NAMED]) + (f" and {len(fresh) - NAMED} more" if len(fresh) > NAMED else "")
    remedy = "train them first (--type ACTOR), or name a model that has them"
    return judged(name, f"{named}; the rest of {count} are those of {start}", remedy, warn=not is_trained)


def _added_rows(key: str, name: str, section: ActorConfig | RewardConfig, tokenizer: Any) -> list[str]:
    """Embeddings of tokens that the model did not have."""
    if name == TINY:
        return []
    rows = read_model_config(name, key, section).get_text_config().vocab_size
    return [f"embedding of {tokenizer.convert_ids_to_tokens(id)}" for id in range(rows, len(tokenizer))]


def _rows_to_judge(session: Session) -> list[tuple[Prompt, str]]:
    """Prompts and replies of several lengths."""
    inputs = session.inputs
    if inputs.reward is not None:
        rows = sampled(inputs.reward.train, PADDED_ROWS)
        return [(row.prompt, row.chosen if isinstance(row, Preference) else row.completion) for row in rows]
    if rows := few_demonstrations(inputs):
        return [(row.prompt, row.completion) for row in rows]
    return [(prompt, REPLIES[i % 2]) for i, prompt in enumerate(few_prompts(inputs)[:PADDED_ROWS])]
