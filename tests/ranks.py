"""Work that a test has done by several processes and by one, to compare what comes out.

As a program (`torchrun tests/ranks.py FILE`) it does all of `CASES` and rank 0 writes the results to the file.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
from tiny import EOS, PAD, engine, llama, prompts

from chatrlhf.errors import RewardError
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import ActorCritic, PolicyOnly, SeparateCritic, SharedTrunk
from chatrlhf.models.frozen_trunk import FrozenTrunk, freeze_trunk
from chatrlhf.models.reference import Reference
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.data_parallel import rollout_rows
from chatrlhf.rl.experience import ALGORITHMS, Estimation, make_experience
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.master_weights import MasterWeights, to_bfloat16
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.update import Updater, UpdateSettings
from chatrlhf.runtime import collectives
from chatrlhf.types import PromptBatch

DISTRIBUTION = SamplingDistribution(temperature=0.9, eos_token_ids=(EOS,), forbidden_ids=(PAD,))

# What is trained, by which algorithm, at which batch size; of minibatches of one row a rank has none. Then, in which
# precision and how many samples a prompt.
CASES = {
    "separate critic": ("separate", "ppo", 4, "fp32", 1),
    "shared trunk": ("shared", "ppo", 4, "fp32", 1),
    "frozen trunk": ("frozen", "ppo", 4, "fp32", 1),
    "frozen trunk, one row a step": ("frozen", "ppo", 1, "fp32", 1),
    "rloo": ("none", "rloo", 4, "fp32", 4),
    "grpo": ("none", "grpo", 3, "fp32", 2),
    "fewer prompts than ranks": ("frozen", "ppo", 4, "fp32", 12),
    "one row a step": ("separate", "ppo", 1, "fp32", 1),
    "bfloat16": ("separate", "ppo", 12, "bf16", 1),
}
ROWS = 12


def actor_critic(kind: str) -> ActorCritic:
    policy = llama()
    torch.manual_seed(5)
    if kind == "separate":
        return SeparateCritic(policy, llama(seed=2).base_model, ScalarHead(16), DISTRIBUTION)
    if kind == "none":
        return PolicyOnly(policy, DISTRIBUTION)
    if kind == "frozen":
        freeze_trunk(policy, 1)
    shared = SharedTrunk(policy, ScalarHead(16), DISTRIBUTION)
    return FrozenTrunk(shared, 1) if kind == "frozen" else shared


def batch(samples: int) -> PromptBatch:
    """Prompts whose responses have room for 2 tokens, or for 40: the first rank's are short, the last's long."""
    lengths = [40, 38, 40, 39, 3, 2][: ROWS // samples] if samples > 1 else [40, 38, 40, 39, 40, 40, 3, 2, 1, 4, 3, 2]
    return prompts(lengths, samples=samples)


def ppo_steps(
    kind: str, algorithm: str, batch_size: int, precision: str, samples: int, deal: Any = None, clip: float | None = 1.0
) -> dict[str, Any]:
    """Two rollouts with their updates: what was sampled, what came of it, the weights at the end.

    ``deal`` makes an updater that shards what it trains (`zero_ranks.py`), ``clip`` is the norm of gradients.

    In bfloat16 it is one rollout and one step: where rows are cut otherwise the products round otherwise, and steps
    carry that on.
    """
    made = actor_critic(kind)
    reference = made.reference() if kind == "frozen" else Reference(copy.deepcopy(made.policy), DISTRIBUTION)
    sampler = engine(made.policy, DISTRIBUTION, max_new_tokens=40, max_length=42)
    given = batch(samples)
    rows = rollout_rows(given.group_ids)
    # In float32 in any case: in bfloat16 a token may depend on what is sampled beside it.
    rollout = sampler.generate(given, seed=0, rows=rows)
    masters, mixed = None, precision == "bf16"
    if mixed and deal is None:
        masters = MasterWeights(*made.backbones())
        to_bfloat16(reference.model)
    reward = FunctionReward(lambda users, replies: [len(set(each)) - len(each) / 8 for each in replies], "variety")
    scorer = Scorer(made, reference, reward, RewardScaling("running", 10.0, 0.5), torch.device("cpu"), 3)
    groups = made.parameter_groups(0.05, 0.05)
    settings = UpdateSettings(1 if mixed else 2, batch_size, 2, entropy_coef=0.01, max_grad_norm=clip)
    rest = ALGORITHMS[algorithm], settings, torch.device("cpu")
    if deal is not None:
        sampler.moves_weights = False
        updater = deal(made, reference, groups, torch.bfloat16 if mixed else torch.float32, *rest)
    else:
        optimizer = torch.optim.SGD(masters.groups(groups) if masters else groups, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        backend = PlainBackend(made, optimizer, scheduler, torch.device("cpu"), masters)
        updater = Updater(made, *rest, backend)
    found: dict[str, Any] = {}
    for step in range(1 if mixed else 2):
        with updater.backend.gathered_weights():
            if step > 0:
                rollout = sampler.generate(given, seed=step, rows=rows)
            scored = scorer.score(rollout, rows)
        experience = make_experience(scored, ALGORITHMS[algorithm], Estimation(kl_coef=0.1))
        stats = updater.update(experience, 0.1, torch.Generator().manual_seed(step))
        whole = scored.rollout
        found |= {
            f"ids {step}": whole.response_ids * whole.response_mask,
            f"texts {step}": [whole.prompts.texts, whole.completions],
            f"advantages {step}": experience.advantages,
            f"scores {step}": scored.scores,
            f"numbers {step}": {**stats, "kl": scored.kl_to_reference, "entropy": scored.entropy},
        }
    with updater.backend.full_precision():
        return found | {"weights": {name: each.clone() for name, each in made.state_dict().items()}}


def check_that_an_error_is_shared() -> None:
    """What one rank is refused all are, with its message; and all can go on from there."""

    def work() -> int:
        if collectives.rank() == 1:
            raise RewardError("of rank 1")
        return 7

    try:
        found = str(collectives.gather_results(work))
    except RewardError as error:
        found = str(error)
    assert collectives.gather_objects(found) == ["of rank 1"] * collectives.world_size()
    assert collectives.all_reduce_max(collectives.rank()) == collectives.world_size() - 1


def main() -> None:
    torch.set_num_threads(1)
    collectives.start()
    assert collectives.world_size() == int(os.environ["WORLD_SIZE"])
    check_that_an_error_is_shared()
    results = {name: ppo_steps(*case) for name, case in CASES.items()}
    # Every rank ends with the same weights, bit for bit.
    for name, result in results.items():
        first, *others = collectives.gather_objects(result["weights"])
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first), name
    if collectives.is_main():
        torch.save(results, sys.argv[1])
    collectives.end()


if __name__ == "__main__":
    main()
