"""Checks of the rows that a run is about to read: with each other, with the template and with its tokenizers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from chatrlhf.config.schema import Config
from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.inputs import Inputs
from chatrlhf.data.row_checks import check_overlap, check_repeats, sampled
from chatrlhf.data.stage_rows import Demonstration
from chatrlhf.data.template_checks import check_bos, check_eos, check_template_ids, check_unknown
from chatrlhf.errors import ConfigError
from chatrlhf.models.loading.pretrained import hub_kwargs
from chatrlhf.models.loading.tiny import TINY
from chatrlhf.models.loading.tokenizer import load_tokenizer, same_tokenizer
from chatrlhf.runtime.check_result import CheckResult

FEW_ROWS = 8  # of each stage, whose ids are compared with transformers'


def check_data(inputs: Inputs) -> list[CheckResult]:
    """Rows that repeat each other, and held-out ones that are trained on."""
    of_stage = {"ACTOR": inputs.actor, "REWARD": inputs.reward, "RL": inputs.prompts}
    known = {stage: rows for stage, rows in of_stage.items() if rows is not None}
    return [check(stage, rows) for stage, rows in known.items() for check in (check_repeats, check_overlap)]


def check_template(inputs: Inputs, encoder: Encoder) -> list[CheckResult]:
    """Ids, BOS and EOS of a few rows of all stages."""
    prompts, replies = few_prompts(inputs), few_demonstrations(inputs)
    results = [check_template_ids(encoder, prompts), check_bos(encoder, prompts)] if prompts else []
    return [*results, check_eos(encoder, replies)] if replies else results


def check_tokenizers(config: Config, stages: list[str], inputs: Inputs, tokenizer: Any) -> list[CheckResult]:
    """The actor's tokenizer, and beside it that of a reward model of another origin."""
    texts = [prompt.text for prompt in few_prompts(inputs)]
    texts += [row.completion for row in few_demonstrations(inputs)]
    if not texts:
        return []
    results, reward = [check_unknown("tokenizer of the actor", tokenizer, texts)], config.reward_config
    if reward.reward_fn is None and reward.model not in (None, "actor", TINY) and {"REWARD", "RL"} & set(stages):
        with suppress(ConfigError):  # what cannot be loaded is refused where it is used
            own = load_tokenizer(
                reward.tokenizer_path or reward.model, "reward_config.tokenizer_path", **hub_kwargs(reward)
            )
            results.append(check_pair(tokenizer, own, texts))
    return results


def check_pair(actor: Any, reward: Any, texts: Sequence[str]) -> CheckResult:
    """The reward model has the actor's tokenizer, or one that knows what the actor says."""
    name = "tokenizer of the reward model"
    if same_tokenizer(actor, reward):
        return CheckResult(name, "pass", f"it is the actor's, {len(actor):,} tokens")
    result = check_unknown(name, reward, texts)
    return replace(result, measured=f"it is another than the actor's, so replies are encoded anew; {result.measured}")


def few_prompts(inputs: Inputs) -> list[Prompt]:
    """Prompts that the policy reads; where there are none, those of judgements."""
    if inputs.actor is None and inputs.prompts is None and inputs.reward is not None:
        return [row.prompt for row in sampled(inputs.reward.train, FEW_ROWS)]
    prompts = sampled(inputs.prompts.train, FEW_ROWS) if inputs.prompts is not None else []
    return [*(row.prompt for row in few_demonstrations(inputs)), *prompts]


def few_demonstrations(inputs: Inputs) -> list[Demonstration]:
    """Rows of the ACTOR stage that are a prompt and a reply."""
    rows = sampled(inputs.actor.train, FEW_ROWS) if inputs.actor is not None else []
    return [row for row in rows if isinstance(row, Demonstration)]
