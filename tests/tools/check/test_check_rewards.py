"""`chatrlhf check`: reward functions, padding, memory, time, room."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest
import small_run
import torch
import yaml
from tiny import llama, tokenizer
from torch import nn

from chatrlhf.conversation import Prompt
from chatrlhf.data.encoder import Encoder
from chatrlhf.data.templates import FORMATS
from chatrlhf.models.loading.backbone import backbone_of
from chatrlhf.models.reward_model import RewardScorer
from chatrlhf.models.reward_network import RewardModel
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.runtime import disk_space
from chatrlhf.tools.check import resources, run_checks
from chatrlhf.tools.check.resources import check_disk, check_plan
from chatrlhf.tools.check.reward_function import answers, check_padding, check_reward_function
from chatrlhf.tools.plan.hardware import Device, Hardware
from chatrlhf.tools.plan.sft_reward_memory import Phase

ROWS = [(Prompt.of("the cat"), "sat"), (Prompt.of("the hat of the cat"), "is on the mat"), (Prompt.of("a"), "b")]


def relative(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function whose scores depend on the whole batch."""
    longest = max(map(len, completions))
    return [len(completion) / longest for completion in completions]


def test_a_function_answers_for_two_rows(session):
    results = list(check_reward_function(session("RL", reward_config__reward_fn="small_run:length")))
    assert [result.status for result in results] == ["pass", "pass"]
    assert results[0].measured.endswith(": 12, 49")
    assert not list(check_reward_function(session("ACTOR", reward_config__reward_fn="small_run:length")))


def test_a_score_that_depends_on_other_rows_is_told():
    results = list(answers(FunctionReward(relative, "relative").texts, ["a", "b"]))
    assert [result.status for result in results] == ["pass", "warn"] and results[1].remedy


def test_a_function_that_raises_fails(data, tmp_path, monkeypatch):
    monkeypatch.setattr(small_run, "length", lambda prompts, completions: 1 / 0)
    groups = [group for group in run_checks.GROUPS if group.name in ("data", "configuration", "reward function")]
    monkeypatch.setattr(run_checks, "GROUPS", groups)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_run.settings(data)))
    words = ["reward_config.reward_fn=small_run:length"]
    *_, result = run_checks.run_checks(str(tmp_path / "config.yaml"), words, "RL", False)
    assert result.name == "reward function" and result.status == "fail" and "ZeroDivisionError" in result.measured


def scorer(blind: bool = False) -> RewardScorer:
    made = tokenizer()
    model = RewardModel(backbone_of(llama(vocab=len(made))), ScalarHead(16))
    if blind:  # reads the last column, whether it is padding or not
        nn.Module.__setattr__(model, "_last", lambda ids, mask: torch.full((len(ids),), ids.shape[1] - 1))
    return RewardScorer(model.eval(), Encoder.of(made, FORMATS["raw"], 64))


@pytest.mark.parametrize("blind, status", [(False, "pass"), (True, "fail")], ids=["by the mask", "by the column"])
def test_a_score_does_not_depend_on_padding(blind, status):
    judge = scorer(blind)
    judge.model.head.out.weight.data.mul_(20)
    result = check_padding("padding", lambda *rows: torch.tensor(judge.score(*rows)), ROWS)
    assert result.status == status, result


@pytest.mark.parametrize(
    "share, status", [(0.5, "pass"), (0.95, "warn"), (1.5, "fail")], ids=["fits", "is tight", "does not fit"]
)
def test_memory_is_compared_with_the_plan(session, monkeypatch, share, status):
    stage = SimpleNamespace(name="ACTOR", most=Phase("ACTOR step", {"weights": 10**9}), seconds=None)
    hardware = Hardware(Device("a small one", 10**9 / share))
    monkeypatch.setattr(resources, "plan_run", lambda *_: SimpleNamespace(stages=[stage], hardware=hardware))
    (result,) = check_plan(session("ACTOR"))
    assert result.name == "ACTOR memory and time" and result.status == status and "a small one" in result.measured


@pytest.mark.parametrize(
    "free, status", [(10**9, "pass"), (10**5, "warn"), (10**3, "fail")], ids=["all", "some", "none"]
)
def test_room_on_the_disk_is_that_of_checkpoints_and_result(session, monkeypatch, free, status):
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(free))
    result = check_disk(session("ACTOR"), "ACTOR", llama(), 2)
    assert result.status == status and bool(result.remedy) == (status != "pass"), result
