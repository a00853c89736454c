"""PPO of two processes that shard what they train, by DeepSpeed and FSDP2: the steps of one process."""

from __future__ import annotations

import pytest
import ranks
import sharded_ranks
import torch
from small_run import ROOT, TORCHRUN, finish, start_python

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def by_two(tmp_path_factory) -> dict:
    """What `tests/sharded_ranks.py` finds in two processes, one of which has the long responses."""
    found = tmp_path_factory.mktemp("ranks") / "found.pt"
    status, out, err = finish(start_python(*TORCHRUN, "2", str(ROOT / "tests" / "sharded_ranks.py"), str(found)))
    assert status == 0, err
    return torch.load(found)


@pytest.mark.parametrize("engine, case", sharded_ranks.CASES)
def test_two_ranks_sample_and_learn_as_one_process(by_two, one_thread, engine, case):
    clip, exact = sharded_ranks.clip_of(case), "bf16" not in ranks.CASES[case]
    got, want = by_two[engine, case], ranks.ppo_steps(*ranks.CASES[case], clip=clip)
    for step in (0, 1) if exact else (0,):
        assert torch.equal(got[f"ids {step}"], want[f"ids {step}"])
        ours, theirs = got[f"numbers {step}"], want[f"numbers {step}"]
        if clip is None:  # the norm of all that an engine trains, not of the policy alone
            ours.pop("ppo/grad_norm"), theirs.pop("ppo/grad_norm")
        near = dict(rel=1e-4, abs=1e-6) if exact else dict(rel=2e-3, abs=2e-3)
        assert ours == pytest.approx(theirs, **near)
    start = ranks.actor_critic(ranks.CASES[case][0]).state_dict()
    for name, weight in want["weights"].items():
        moved, apart = weight - start[name], got["weights"][name] - weight
        if exact:
            assert apart.abs().max() <= 2e-4 * moved.abs().max(), name
        else:
            assert apart.norm() <= 0.1 * moved.norm(), name
    assert any(not torch.equal(weight, start[name]) for name, weight in want["weights"].items())
