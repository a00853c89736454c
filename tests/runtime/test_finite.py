"""What is not finite is found and named, never published; steps that are left out are said, kept and counted."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from chatrlhf.errors import DivergedError, RewardError
from chatrlhf.runtime.finite import first_module_not_finite, first_not_finite, moments, require_finite, trained
from chatrlhf.runtime.skipped_steps import SkippedSteps


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_first_tensor_is_named(value, dtype):
    good, bad = torch.ones(3, dtype=dtype), torch.ones(2, 2, dtype=dtype)
    bad[1, 0] = value
    assert first_not_finite([("a", good), ("b", bad), ("c", bad)]) == "b"
    assert first_not_finite([("a", good), ("numbers", torch.arange(3))]) is None


def test_weights_and_moments_are_required_to_be_finite():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    require_finite("RL step 2", [*trained(model), *moments(optimizer)], "resume")
    optimizer.state[model.bias]["exp_avg_sq"][0] = torch.inf
    with pytest.raises(DivergedError, match=r"^RL step 2: the optimizer's exp_avg_sq of parameter 1 is not finite, so"):
        require_finite("RL step 2", [*trained(model), *moments(optimizer)], "resume")
    model.weight.requires_grad_(False)[0] = torch.nan  # frozen: it is not written
    require_finite("RL step 2", trained(model), "resume")


def test_the_first_module_is_named_in_the_order_of_the_forward():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    given = torch.ones(1, 2)
    assert first_module_not_finite(model, lambda: model(given)) is None
    with torch.no_grad():
        model[2].weight[0, 0] = model[1][0].bias[0] = torch.inf
    assert first_module_not_finite(model, lambda: model(given)) == "1.0"
    assert all(not module._forward_hooks for module in model.modules())


ROWS = [{"row": 3, "text": "ä"}, {"row": 5, "text": "b"}]


def skipped(folder, limit=3) -> tuple[SkippedSteps, list[str]]:
    said: list[str] = []
    return SkippedSteps("ACTOR", folder, limit, said.append, "Lower actor_config.lr"), said


def test_a_skipped_step_is_said_and_its_batch_kept(tmp_path):
    steps, said = skipped(tmp_path)
    steps.skip(12, "loss nan", "model.layers.1.mlp", ROWS)
    assert said == [
        "ACTOR step 12: loss nan (model.layers.1.mlp is the first that is not finite); rows 3, 5, which are in "
        f"{tmp_path}/skipped/step-000012.json; the step is not taken (1 in a row, 3 end the run)"
    ]
    kept = json.loads((tmp_path / "skipped" / "step-000012.json").read_text(encoding="utf-8"))
    assert kept == {"stage": "ACTOR", "step": 12, "why": "loss nan", "where": "model.layers.1.mlp", "rows": ROWS}


def test_several_in_a_row_end_the_run(tmp_path):
    steps, said = skipped(tmp_path, limit=2)
    steps.skip(1, "loss nan", None, ROWS)
    steps.taken()
    steps.skip(3, "loss nan", None, ROWS)
    with pytest.raises(
        DivergedError, match=r"step 4: loss inf; rows 3, 5.*2 steps in a row.*Lower actor_config.lr, then"
    ):
        steps.skip(4, "loss inf", None, ROWS)
    assert len(said) == 2 and steps.total == 3
    steps.in_a_row = 1
    with pytest.raises(RewardError, match="score 1 is nan"):  # what was wrong says more
        steps.skip(5, "", None, ROWS, RewardError("score 1 is nan"))


def test_a_part_of_a_step_does_not_count_in_a_row(tmp_path):
    steps, said = skipped(None, limit=1)
    steps.skip(1, "loss nan", None, ROWS, counts=False)
    assert (steps.in_a_row, steps.total) == (0, 1)
    assert said == ["ACTOR step 1: loss nan; rows 3, 5; nothing is learned from these"]


def test_many_rows_are_not_all_named():
    steps, said = skipped(None)
    steps.skip(1, "loss nan", None, [{"row": number} for number in range(1, 31)])
    assert "rows 1, 2, 3, 4, 5, 6, 7, 8 and 22 more;" in said[0]


def test_its_count_goes_with_a_checkpoint():
    steps, _ = skipped(None)
    steps.skip(1, "loss nan", None, ROWS)
    other, _ = skipped(None)
    other.load_state_dict(json.loads(json.dumps(steps.state_dict())))
    assert (other.total, other.in_a_row) == (1, 1)
