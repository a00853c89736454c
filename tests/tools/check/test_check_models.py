"""`chatrlhf check`: fresh weights are named, a fresh policy is its own reference."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from tiny import llama, tokenizer
from transformers import AutoModelForSequenceClassification

from chatrlhf.errors import NotTrainedError
from chatrlhf.models.loading.loading_report import fresh_weights, load_pretrained
from chatrlhf.tools.check import policy
from chatrlhf.tools.check.models import NAMED, check_actor, check_reward_model, fresh_weights_result
from chatrlhf.tools.check.policy import check_policy, first_experience, fresh_policy_results, fresh_trainer


@pytest.fixture(scope="module")
def named(tmp_path_factory) -> str:
    """A model's folder whose tokenizer has two tokens more than the model has embeddings."""
    folder, made = tmp_path_factory.mktemp("named"), tokenizer()
    llama(vocab=len(made)).save_pretrained(folder)
    made.add_tokens(["<new>", "<other>"])
    made.save_pretrained(folder)
    return str(folder)


def test_weights_of_a_file_are_none_that_are_fresh():
    result = fresh_weights_result("actor", "folder", llama(), [], False)
    assert result.status == "pass" and result.measured.startswith("none; all ")


def test_fresh_weights_are_named_and_warned_of_where_nothing_trains_them():
    names = [f"layer {i}" for i in range(NAMED + 2)]
    assert fresh_weights_result("actor", "folder", llama(), names, True).status == "pass"
    result = fresh_weights_result("actor", "folder", llama(), names, False)
    assert result.status == "warn" and "layer 5 and 2 more; the rest" in result.measured and result.remedy


def test_the_tiny_model_is_fresh_as_asked_and_none_to_begin_rl_with(session):
    (actor, room) = check_actor(session("ACTOR REWARD RL"))
    assert actor.status == room.status == "pass" and "drawn at random, as 'tiny' asks" in actor.measured
    (actor,) = check_actor(session("RL", reward_config__reward_fn="small_run:length"))
    assert actor.status == "warn"


def test_rl_starts_from_the_actor_that_is_there(session, tmp_path):
    made = session("RL", reward_config__reward_fn="small_run:length")
    (tmp_path / "run" / "actor").mkdir(parents=True)
    record = {"stages": {"ACTOR": {"status": "done", "model": "tiny", "output": "actor", "metrics": {}}}}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(record))
    (actor,) = check_actor(made)
    assert actor.status == "pass" and str(tmp_path / "run" / "actor") in actor.measured
    assert not list(check_actor(session("REWARD")))


def test_added_embeddings_are_named(session, named):
    keys = {"actor_config__model": named, "actor_config__resize_embeddings": True, "reward_config__model": named}
    made = session("ACTOR REWARD", **keys, reward_config__resize_embeddings=True)
    actor, _ = check_actor(made)
    assert actor.status == "pass" and "embedding of <new>, embedding of <other>; the rest" in actor.measured
    reward, padding, room = check_reward_model(made)
    assert "head.out.weight" in reward.measured and "embedding of <new>" in reward.measured
    assert reward.status == padding.status == room.status == "pass"


def test_what_a_file_lacks_and_may_lack_is_noted_while_it_is_loaded(named):
    with fresh_weights() as fresh:
        load_pretrained(AutoModelForSequenceClassification, named, "key", fresh=("score.",), num_labels=1)
    load_pretrained(AutoModelForSequenceClassification, named, "key", fresh=("score.",), num_labels=1)
    assert fresh == ["key: score.weight"]


def test_checks_of_models_leave_the_global_generators_alone(session):
    made = session("ACTOR")
    state = torch.get_rng_state()
    list(check_actor(made))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_fresh_policy_is_its_own_reference(session):
    results = list(check_policy(session("ACTOR REWARD RL", trainer_config__samples_per_prompt=2)))
    assert [result.name for result in results[:3]] == ["RL KL of the fresh policy", "RL first ratio", "RL sampler"]
    assert {result.status for result in results} == {"pass"}
    assert not list(check_policy(session("ACTOR")))


@pytest.mark.parametrize("loss, passes", [(2.0, True), (5.6, False)], ids=["learned", "guesses"])
def test_rl_is_told_that_it_would_not_start_from_an_untrained_actor(session, tmp_path, loss, passes):
    keys = {"reward_config__reward_fn": "small_run:length", "guards_config__allow_untrained_actor": False}
    made = session("RL", **keys)
    (tmp_path / "run" / "actor").mkdir(parents=True)
    losses = {"loss/eval_start": 5.7, "loss/eval": loss, "loss/chance": 5.7}
    stage = {"status": "done", "model": "tiny", "output": "actor", "metrics": losses}
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"stages": {"ACTOR": stage}}))
    results = check_policy(made)
    if passes:
        assert next(results).name == "RL readiness"
    else:
        with pytest.raises(NotTrainedError, match="that of guessing"):
            next(results)


def test_a_policy_that_is_another_than_its_reference_fails(session, monkeypatch):
    make = policy.starting_models

    def changed(*args):
        models = make(*args)
        with torch.no_grad():
            models.reference.model.get_input_embeddings().weight[:, 0].add_(0.1)
        return models

    monkeypatch.setattr(policy, "starting_models", changed)
    kl, ratio, sampler, _ = check_policy(session("ACTOR RL", reward_config__reward_fn="small_run:length"))
    assert kl.status == "fail" and kl.remedy and ratio.status == sampler.status == "pass"


def test_a_ratio_and_a_sampler_that_are_off_fail(session):
    trainer = fresh_trainer(session("ACTOR RL", reward_config__reward_fn="small_run:length"))
    scored, _ = first_experience(trainer)
    _, ratio, sampler = fresh_policy_results(scored, 0.1, 1e-3)
    assert ratio.status == "fail" and ratio.remedy and sampler.status == "pass"
    other = replace(scored.rollout, sampling_logprobs=scored.rollout.sampling_logprobs - 0.1)
    kl, ratio, sampler = fresh_policy_results(replace(scored, rollout=other), float("nan"), 1e-3)
    assert kl.status == "pass" and ratio.status == sampler.status == "fail"
