"""Equality with TRL 1.12.0's PPOTrainer, from the tokens it sampled to the losses of its third epoch.

`fixtures/freeze_trl.py` let the real trainer run and wrote down what it computed. Here its tokens go through this
package. Where the two differ by convention, a comment says how, and the test takes TRL's side.
"""

import dataclasses
import functools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import assert_same_gradients, gradients, updater
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.functional.masked import whiten
from chatrlhf.functional.rewards import token_rewards
from chatrlhf.models.actor_critic import Reference, SeparateCritic
from chatrlhf.models.reward_model import RewardModel
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.scoring import Scorer
from chatrlhf.types import Experience, PromptBatch, Rollout, ScoredRollout

FILE = Path(__file__).parent / "fixtures" / "trl_1_12_0.safetensors"
FROZEN = load_file(FILE)
with safe_open(FILE, "pt") as opened:
    ABOUT = json.loads(opened.metadata()["about"])
SETTINGS, EPOCHS = ABOUT["settings"], ABOUT["settings"]["num_ppo_epochs"]
FULL = [case for case, how in ABOUT["cases"].items() if not how["ends"]]
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4

# TRL divides by its temperature plus 1e-7.
DISTRIBUTION = SamplingDistribution(temperature=SETTINGS["temperature"] + 1e-7)


def part(prefix: str) -> dict[str, Tensor]:
    """The frozen tensors whose name starts with ``prefix.``, by the rest of it."""
    return {name.removeprefix(prefix + "."): t for name, t in FROZEN.items() if name.startswith(prefix + ".")}


def language_model(name: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**ABOUT["config"]))
    model.load_state_dict(part(name))
    return model


def scalar_model(name: str) -> tuple[LlamaModel, ScalarHead]:
    """Backbone and head of a sequence classifier of one label."""
    backbone, head = LlamaModel(LlamaConfig(**ABOUT["config"])), ScalarHead(ABOUT["config"]["hidden_size"])
    backbone.load_state_dict(part(f"{name}.model"))
    head.zero_().out.weight.data.copy_(FROZEN[f"{name}.score.weight"])
    head.out.bias.requires_grad_(False)  # a classifier's has none
    return backbone, head


def trained() -> SeparateCritic:
    return SeparateCritic(language_model("policy"), *scalar_model("critic"), DISTRIBUTION)


def rollout(case: str, mask: Tensor) -> Rollout:
    """TRL's prompts and tokens; those under ``mask`` count as the response."""
    found = part(case)
    prompt_mask = found["prompts"] != ABOUT["pad"]
    rows = len(prompt_mask)
    # TRL's pad lies outside the vocabulary.
    prompts = PromptBatch(found["prompts"] * prompt_mask, prompt_mask, torch.arange(rows), [""] * rows)
    finished = ((found["responses"] == ABOUT["eos"]) & mask).any(dim=1) & torch.tensor(ABOUT["cases"][case]["ends"])
    none = torch.zeros(rows, dtype=torch.long)
    return Rollout(prompts, found["responses"], mask, found["logprobs"], finished, none, [""] * rows)


def reward(batch: Rollout) -> Tensor:
    """TRL's reward model as one of this package."""
    mask = torch.cat([batch.prompts.attention_mask, batch.response_mask], dim=1)
    ids = torch.cat([batch.prompts.input_ids, batch.response_ids], dim=1)
    return RewardModel(*scalar_model("reward")).score(ids, mask)


@functools.cache
def scored(case: str, mask_name: str = "mask") -> ScoredRollout:
    reference = Reference(language_model("reference"), DISTRIBUTION)
    scaling = RewardScaling(missing_eos_penalty=SETTINGS["missing_eos_penalty"])
    # Three rows at once: TRL's own forward had all eight, and its padding on the left.
    scorer = Scorer(trained(), reference, reward, scaling, torch.device("cpu"), micro_batch_size=3)
    return scorer.score(rollout(case, FROZEN[f"{case}.{mask_name}"]))


def estimation(case: str) -> Estimation:
    gamma = ABOUT["cases"][case]["gamma"]
    return Estimation(SETTINGS["kl_coef"], gamma, SETTINGS["lam"], whiten_advantages=False)


def whitened(advantages: Tensor, mask: Tensor) -> Tensor:
    """TRL divides by the sample's deviation (Bessel's n - 1), this package by the population's (n)."""
    count = int(mask.sum())
    return whiten(advantages, mask) * math.sqrt((count - 1) / count)


def trl_updater(made: SeparateCritic):
    """TRL does not clip gradients, and the frozen run descended them with plain SGD."""
    names = ("cliprange", "cliprange_value", "vf_coef")
    settings = {name: SETTINGS[name] for name in names} | {"max_grad_norm": None, "micro_batch_size": 3}
    return updater(made, lr=SETTINGS["learning_rate"], **settings)


def assert_close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def assert_gradients_are_trls(made: SeparateCritic, case: str, model: str) -> None:
    ours = gradients(made.policy)
    if model == "critic":
        ours = {f"model.{name}": gradient for name, gradient in gradients(made.critic).items()}
        ours["score.weight"] = made.value_head.out.weight.grad
    assert_same_gradients(ours, part(f"{case}.gradient.{model}"), GRADIENT_TOLERANCE)


# ----- rows of full length: nothing differs but the whitening


@pytest.mark.parametrize("case", FULL)
def test_logprobs_values_and_scores_are_trls(case):
    found, ours = part(case), scored(case)
    assert ours.rollout.response_mask.all()
    assert_close(ours.old_logprobs, found["logprobs"])
    assert_close(ours.ref_logprobs, found["ref_logprobs"])
    assert_close(ours.values, found["values"])
    assert_close(ours.scores, found["scores"])
    assert ours.kl_to_reference == pytest.approx(found["kl"].item(), abs=1e-4)  # a sum over 12 tokens


@pytest.mark.parametrize("case", FULL)
def test_rewards_advantages_and_returns_are_trls(case):
    found, ours, how = part(case), scored(case), estimation(case)
    mask = ours.rollout.response_mask
    rewards = token_rewards(ours.scores, ours.old_logprobs, ours.ref_logprobs, mask, how.kl_coef)
    assert_close(rewards, found["rewards"])
    experience = make_experience(ours, ALGORITHMS["ppo"], how)
    assert_close(experience.advantages, found["advantages"])
    assert_close(experience.returns, found["returns"])
    assert_close(whitened(experience.advantages, mask), found["whitened_advantages"])


def full_experience(case: str) -> Experience:
    experience = make_experience(scored(case), ALGORITHMS["ppo"], estimation(case))
    experience.advantages = whitened(experience.advantages, experience.response_mask)
    return experience


@pytest.mark.parametrize("case", FULL)
def test_the_first_gradient_is_trls(case):
    made = trained()
    trl_updater(made).backward(full_experience(case), kl_coef=SETTINGS["kl_coef"])
    for model in ("policy", "critic"):
        assert_gradients_are_trls(made, case, model)


@pytest.mark.parametrize("case", FULL)
def test_the_losses_of_every_epoch_are_trls(case):
    found, update, experience = part(case), trl_updater(trained()), full_experience(case)
    steps = [update.step(experience, kl_coef=SETTINGS["kl_coef"]) for _ in range(EPOCHS)]
    assert_close(torch.tensor([step["loss/policy"] for step in steps]), found["policy_losses"])
    assert_close(torch.tensor([step["loss/value"] for step in steps]), found["value_losses"])
    clipped = sum(step["ppo/clipfrac"] for step in steps) / EPOCHS
    assert clipped == pytest.approx(found["clipfrac"].item(), abs=1e-6)
    assert clipped > 0.01  # both branches of the clip were taken


# ----- rows that end: TRL lets the score fall one step later
#
# Behind a row that ended before the last column TRL counts one token more: a step without a KL term that gets the
# score, and whose value (of the state behind EOS) the critic learns. Here the score lands on EOS itself. So the
# critic's side is TRL's under a mask that is one token longer there; the policy's side keeps the real tokens.


def test_ragged_rows_have_trls_logprobs_values_and_scores():
    found, ours = part("ragged"), scored("ragged")
    mask, lengths = found["mask"], found["mask"].sum(dim=1)
    assert 1 < lengths.min() < mask.shape[1] and mask.all(dim=1).any()
    assert torch.equal(found["value_mask"].sum(dim=1), (lengths + 1).clamp(max=mask.shape[1]))
    assert_close(ours.old_logprobs[mask], found["logprobs"][mask])
    assert_close(ours.ref_logprobs[mask], found["ref_logprobs"][mask])
    assert_close(ours.scores, found["scores"])
    assert_close(ours.values[mask], found["values"][mask])
    assert_close(scored("ragged", "value_mask").values, found["values"])


def one_step_longer() -> ScoredRollout:
    """The ragged rows with TRL's extra step: it has a value and the score, but no KL term."""
    longer, mask = scored("ragged", "value_mask"), FROZEN["ragged.mask"]
    ref_logprobs = torch.where(mask, longer.ref_logprobs, longer.old_logprobs)
    return dataclasses.replace(longer, scores=scored("ragged").scores, ref_logprobs=ref_logprobs)


def test_ragged_rows_have_trls_rewards_advantages_and_returns_one_step_later():
    found, longer, how = part("ragged"), one_step_longer(), estimation("ragged")
    mask = longer.rollout.response_mask
    rewards = token_rewards(longer.scores, longer.old_logprobs, longer.ref_logprobs, mask, how.kl_coef)
    assert_close(rewards, found["rewards"])
    experience = make_experience(longer, ALGORITHMS["ppo"], how)
    assert_close(experience.advantages, found["advantages"])
    assert_close(experience.returns, found["returns"])
    # What the policy learns from has no extra step.
    real = found["mask"]
    assert_close(whitened(experience.advantages, real)[real], found["whitened_advantages"][real])


def test_ragged_rows_have_trls_losses_and_gradients():
    found = part("ragged")
    longer = make_experience(one_step_longer(), ALGORITHMS["ppo"], estimation("ragged"))
    advantages = whitened(longer.advantages, found["mask"])
    real = dataclasses.replace(longer, response_mask=found["mask"], advantages=advantages)
    # Policy and critic share nothing, so each is followed under its own mask.
    for model, loss, experience in (("policy", "policy", real), ("critic", "value", longer)):
        made = trained()
        update = trl_updater(made)
        update.backward(experience, kl_coef=SETTINGS["kl_coef"])
        assert_gradients_are_trls(made, "ragged", model)
        steps = [update.step(experience, kl_coef=SETTINGS["kl_coef"]) for _ in range(EPOCHS)]
        assert_close(torch.tensor([step[f"loss/{loss}"] for step in steps]), found[f"{loss}_losses"])
