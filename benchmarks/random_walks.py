"""Random walks: the learning example of trlX, trained with this package's PPO.

A directed graph of 21 nodes, edges with probability 0.1; a walk starts at a given node and should reach the goal
over as few nodes as possible, ten at most. A GPT-2 of 6 layers x 144 is first fine-tuned on random walks, so it
knows the edges and nothing about the way. Then PPO maximizes, within 2,840 episodes,

    optimality = (10 - L) / (10 - L*)    L nodes of the walk, L* of the shortest one; 0 for a walk that takes an
                                         edge that is not there or never reaches the goal

Two settings differ from trlX's in kind. Walks are drawn at temperature 1.3 for training and at 1 for evaluation:
hotter walks keep trying other ways where PPO would settle for a detour early. And lambda is 1: with less, and a
critic that knows nothing yet, later tokens get more of the score, so short walks are favored whatever they scored.

There is no KL term, as in trlX's example, and the controls are why it must not be there: noise drives a policy away
from its reference, a KL penalty summed over a walk is then paid back by making walks shorter, and shorter walks are
better ones here. With a coefficient of 0.05 scores thrown like dice gain as much as 0.16.

Two controls must not learn: scores permuted within each rollout batch, and a learning rate of 0.

    python -m benchmarks.random_walks --graphs 3 --seeds 5
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

from chatrlhf.data.collate import pad_right, prompt_batch
from chatrlhf.data.encoder import IGNORED
from chatrlhf.functional.logprobs import SamplingDistribution
from chatrlhf.models.actor_critic import Reference, SharedTrunk
from chatrlhf.models.scalar_head import ScalarHead
from chatrlhf.rl.experience import ALGORITHMS, Estimation
from chatrlhf.rl.gradient_backend import PlainBackend
from chatrlhf.rl.kl_controller import KLController
from chatrlhf.rl.master_weights import prepare_models
from chatrlhf.rl.ppo import PPOTrainer
from chatrlhf.rl.prompt_schedule import PromptSchedule
from chatrlhf.rl.reward_scaling import RewardScaling
from chatrlhf.rl.rewards import FunctionReward, RewardFunction
from chatrlhf.rl.scoring import Scorer
from chatrlhf.rl.update import Updater, UpdateSettings
from chatrlhf.rollout.context import Limits
from chatrlhf.rollout.engine import RolloutEngine
from chatrlhf.runtime.run_log import RunLog

NODES, EDGE_PROBABILITY, MAX_NODES = 21, 0.1, 10
GOAL = 0
LETTERS = "abcdefghijklmnopqrstu"  # one a node; a token's id is its node's number
EOS = NODES  # stands behind the goal; pads, too
MIN_STARTS, START_RANGE = 16, (0.05, 0.5)  # graphs outside are too poor, or too easy, and are drawn again

WALKS, SFT_EPOCHS, SFT_BATCH, SFT_LR = 1000, 10, 100, 1e-3
ROLLOUTS, STEPS = 71, 40  # 2,840 episodes
EPOCHS = 4  # of one full-batch step each
# The policy's rate climbs over 16 optimizer steps, while the value head (at its full rate at once) learns what to
# expect: without a baseline every walk that arrives is reinforced, detours included. Both then fall to 0.
LR, HEAD_LR, WARM_UP = 3e-4, 3e-3, 16
ROLLOUT_TEMPERATURE = 1.3
SAMPLES = 32  # walks from each start in an evaluation
# Seed 0's graph starts at 0.051: on another machine it might fall below the range and be another graph.
FIRST_GRAPH = 1

MIN_MEDIAN, MIN_WORST, MAX_CONTROL_GAIN = 0.95, 0.90, 0.05


@dataclass(frozen=True)
class Graph:
    """``edges[node]`` are the nodes one step away; the goal has none."""

    edges: tuple[tuple[int, ...], ...]

    @property
    def shortest(self) -> dict[int, int]:
        """Nodes of the shortest walk to the goal, both ends counted, from each node that has one: breadth first."""
        found, frontier = {GOAL: 1}, [GOAL]
        for node in frontier:
            for before, after in enumerate(self.edges):
                if node in after and before not in found:
                    found[before] = found[node] + 1
                    frontier.append(before)
        return found

    @property
    def starts(self) -> list[int]:
        """Where a walk may start: optimality is defined where L* < 10."""
        return sorted(node for node, length in self.shortest.items() if node != GOAL and length < MAX_NODES)

    def optimality(self, walk: str) -> float:
        """The score of a walk of letters, its start included. A node behind the goal is an edge that is not there."""
        nodes = [LETTERS.index(letter) for letter in walk]
        valid = all(after in self.edges[before] for before, after in zip(nodes, nodes[1:], strict=False))
        if not valid or nodes[-1] != GOAL or len(nodes) > MAX_NODES:
            return 0.0
        return (MAX_NODES - len(nodes)) / (MAX_NODES - self.shortest[nodes[0]])

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        """The reward function as a user writes one."""
        return [self.optimality(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]

    def random_walk(self, rng: random.Random) -> list[int]:
        """Token ids of a walk of at most ten nodes from any node but the goal; EOS behind the goal."""
        walk = [rng.choice([node for node in range(NODES) if node != GOAL])]
        while walk[-1] != GOAL and len(walk) < MAX_NODES:
            walk.append(rng.choice(self.edges[walk[-1]]))
        return [*walk, EOS] if walk[-1] == GOAL else walk


def draw_graph(rng: random.Random) -> Graph:
    """A random graph in which every node but the goal leads somewhere, and at least 16 nodes to the goal."""
    while True:
        edges = [
            tuple(other for other in range(NODES) if other != node and rng.random() < EDGE_PROBABILITY)
            for node in range(NODES)
        ]
        edges[GOAL] = ()
        graph = Graph(tuple(edges))
        if all(edges[1:]) and len(graph.starts) >= MIN_STARTS:
            return graph


def decode(ids: list[int]) -> str:
    return "".join(LETTERS[i] if i < NODES else "" for i in ids)


def fine_tune(graph: Graph, seed: int) -> GPT2LMHeadModel:
    """A small GPT-2 fine-tuned on 1,000 random walks: the model that PPO starts from."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=NODES + 1,
                n_layer=6,
                n_embd=144,
                n_head=12,
                n_positions=MAX_NODES + 1,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=None,
                eos_token_id=EOS,
                pad_token_id=EOS,
            )
        )
    ids, mask = pad_right([graph.random_walk(rng) for _ in range(WALKS)], EOS)
    labels = ids.masked_fill(~mask, IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SFT_LR)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SFT_EPOCHS):
        for rows in torch.randperm(WALKS, generator=generator).split(SFT_BATCH):
            loss = model(input_ids=ids[rows], labels=labels[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@dataclass
class Task:
    """A graph and the fine-tuned model that training starts from."""

    graph: Graph
    model: GPT2LMHeadModel
    start: float  # the model's optimality


def draw_task(seed: int) -> Task:
    """A graph whose fine-tuned model is neither lost nor good already."""
    rng = random.Random(seed)
    while True:
        graph = draw_graph(rng)
        model = fine_tune(graph, seed)
        start = evaluate(graph, model)
        if START_RANGE[0] <= start <= START_RANGE[1]:
            return Task(graph, model, start)


def make_engine(model: GPT2LMHeadModel, temperature: float = 1.0) -> RolloutEngine:
    distribution = SamplingDistribution(temperature, eos_token_ids=(EOS,))
    return RolloutEngine(model, distribution, Limits(MAX_NODES - 1, MAX_NODES), EOS, decode)


def evaluate(graph: Graph, model: GPT2LMHeadModel, seed: int = 1) -> float:
    """Mean optimality of 32 sampled walks from every start."""
    texts = [LETTERS[start] for start in graph.starts]
    prompts = prompt_batch([[start] for start in graph.starts], texts, EOS, SAMPLES)
    rollout = make_engine(model).generate(prompts, seed)
    return statistics.fmean(graph.reward(rollout.prompts.texts, rollout.completions))


def shuffled(reward: RewardFunction, seed: int) -> RewardFunction:
    """The same scores, given to the wrong walks of the batch."""
    rng = random.Random(seed)

    def permuted(prompts: list[str], completions: list[str]) -> list[float]:
        scores = list(reward(prompts, completions))
        rng.shuffle(scores)
        return scores

    return permuted


def make_trainer(
    task: Task,
    seed: int,
    run_dir: Path,
    reward: RewardFunction | None = None,
    learning_rates: tuple[float, float] = (LR, HEAD_LR),
    steps: int = STEPS,
    precision: str = "fp32",
) -> PPOTrainer:
    """The package's PPO on this task, put together by hand."""
    device = torch.device("cpu")
    policy = copy.deepcopy(task.model)
    engine = make_engine(policy, ROLLOUT_TEMPERATURE)
    actor_critic = SharedTrunk(policy, ScalarHead(policy.config.n_embd).zero_(), engine.distribution)
    reference = Reference(copy.deepcopy(task.model), engine.distribution)
    masters = prepare_models(actor_critic.backbones(), [reference.model], precision, device)
    groups = actor_critic.parameter_groups(*learning_rates)
    groups = masters.groups(groups) if masters else groups
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    decay, climb = lambda step: max(0.0, 1 - step / (steps * EPOCHS)), lambda step: (step + 1) / (WARM_UP + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: min(climb(step), decay(step)), decay])
    settings = UpdateSettings(epochs=EPOCHS, batch_size=ROLLOUTS, micro_batch_size=ROLLOUTS, vf_coef=0.5)
    log = RunLog(run_dir)
    log.console.quiet = True
    starts = task.graph.starts
    return PPOTrainer(
        prompts=PromptSchedule([[node] for node in starts], [LETTERS[node] for node in starts], EOS, ROLLOUTS, 1, seed),
        engine=engine,
        scorer=Scorer(
            actor_critic,
            reference,
            FunctionReward(reward or task.graph.reward, "optimality"),
            RewardScaling(cliprange=1.0),
            device,
            micro_batch_size=ROLLOUTS,
        ),
        updater=Updater(
            actor_critic,
            ALGORITHMS["ppo"],
            settings,
            device,
            PlainBackend(actor_critic, optimizer, scheduler, device, masters),
        ),
        algorithm=ALGORITHMS["ppo"],
        estimation=lambda coef: Estimation(kl_coef=coef, gamma=1.0, lam=1.0, whiten_advantages=False),
        kl=KLController(0.0),
        num_steps=steps,
        seed=seed,
        log=log,
    )


def run(
    task: Task,
    seed: int,
    reward: RewardFunction | None = None,
    learning_rates: tuple[float, float] = (LR, HEAD_LR),
    steps: int = STEPS,
    precision: str = "fp32",
) -> float:
    """Train once; the optimality at the end."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, seed, Path(folder), reward, learning_rates, steps, precision)
        trainer.train()
    return evaluate(task.graph, trainer.engine.model)


def controls(task: Task, seed: int = 0) -> dict[str, float]:
    """What two trainings that must not learn gain."""
    return {
        "shuffled scores": run(task, seed, reward=shuffled(task.graph.reward, seed)) - task.start,
        "learning rate 0": run(task, seed, learning_rates=(0.0, 0.0)) - task.start,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print one line a run; the exit status is 1 if the runs or the controls miss what they should reach."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.random_walks", description=__doc__.split("\n")[0])
    parser.add_argument("--graphs", type=int, default=3, help="how many graphs")
    parser.add_argument("--seeds", type=int, default=5, help="training seeds for each graph")
    parser.add_argument("--first-graph", type=int, default=FIRST_GRAPH, help="seed of the first graph")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is too small for more
    transformers.logging.set_verbosity_error()
    ends, gains = [], []
    print(f"{'graph':>5} {'starts':>6} {'seed':>15} {'start':>6} {'end':>6} {'gain':>6} {'s':>5}")
    for graph in range(options.first_graph, options.first_graph + options.graphs):
        task = draw_task(graph)
        head = f"{graph:5d} {len(task.graph.starts):6d}"
        for seed in range(options.seeds):
            began = time.perf_counter()
            ends.append(run(task, seed))
            seconds = time.perf_counter() - began
            gain = ends[-1] - task.start
            print(f"{head} {seed:15d} {task.start:6.3f} {ends[-1]:6.3f} {gain:+6.3f} {seconds:5.1f}", flush=True)
        for name, gain in controls(task).items():
            gains.append(gain)
            print(f"{head} {name:>15} {task.start:6.3f} {task.start + gain:6.3f} {gain:+6.3f}", flush=True)
    median, worst = statistics.median(ends), min(ends)
    print(f"median {median:.3f} (aim {MIN_MEDIAN}), worst {worst:.3f} (aim {MIN_WORST})")
    print(f"greatest gain of a control {max(gains):+.3f} (at most {MAX_CONTROL_GAIN})")
    return int(median < MIN_MEDIAN or worst < MIN_WORST or max(gains) > MAX_CONTROL_GAIN)


if __name__ == "__main__":
    raise SystemExit(main())
