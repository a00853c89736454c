"""Random walks against the clock: seconds of training until the median run is good, ours and the stand-in's for trlX.

    python -m benchmarks.walks_race --graphs 3 --seeds 3

The task, the models that training starts from and the 2,840 episodes are those of `random_walks`; each loop has its
own published settings: ours that script's, the stand-in trlX's (20 rounds of 142 walks, 4 epochs of 100 and 42).
Both are judged alike, at temperature 1, every 142 episodes; the clock stands still meanwhile. The time that counts is
the median over all runs at the first judgement where their median optimality is 0.95.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from benchmarks.processes import alternating, cell
from benchmarks.random_walks import (
    EOS,
    FIRST_GRAPH,
    LETTERS,
    MAX_NODES,
    MIN_MEDIAN,
    ROLLOUTS,
    STEPS,
    Task,
    decode,
    draw_task,
    evaluate,
    make_trainer,
)
from benchmarks.trlx_standin.loop import Batch, Settings, StandIn

EPISODES = ROLLOUTS * STEPS
ROUND = 142  # walks that trlX collects between updates here, and the distance between two judgements
MAX_SHARE = 0.25
TRLX = Settings(
    max_new_tokens=MAX_NODES - 1,
    chunk_size=ROUND,
    batch_size=100,
    ppo_epochs=4,
    lr=3e-4,
    betas=(0.9, 0.95),
    init_kl_coef=0.0,
    gamma=1.0,
    lam=0.95,
    cliprange_reward=1.0,
    vf_coef=1.2,
)


@dataclass
class Race:
    """Optimality and seconds of training after so many episodes, of one run."""

    judge: Callable[[], float]
    episodes: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimality: list[float] = field(default_factory=list)
    spent: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    def judged(self, episodes: int) -> None:
        """Stop the clock, judge, go on."""
        self.spent += time.perf_counter() - self.began
        self.episodes.append(episodes)
        self.seconds.append(self.spent)
        self.optimality.append(self.judge())
        self.began = time.perf_counter()


def ours(task: Task, seed: int, rounds: int) -> Race:
    """This package's PPO, all 2,840 episodes or the first rounds of them."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, seed, Path(folder))
        trainer.num_steps = min(STEPS, rounds * ROUND // ROLLOUTS)
        race = Race(lambda: evaluate(task.graph, trainer.engine.model))
        update, steps = trainer.updater.update, [0]

        def then_judge(*args, **kwargs):
            stats = update(*args, **kwargs)
            steps[0] += 1
            if steps[0] * ROLLOUTS % ROUND == 0:
                race.judged(steps[0] * ROLLOUTS)
            return stats

        trainer.updater.update = then_judge
        race.began = time.perf_counter()
        trainer.train()
    return race


def stand_in(task: Task, seed: int, rounds: int) -> Race:
    """The stand-in's loop with trlX's settings."""
    rng = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = copy.deepcopy(task.model)
        model.set_attn_implementation("eager")
        loop = StandIn(model, TRLX, task.graph.reward, decode, lambda text: [LETTERS.index(x) for x in text], EOS, EOS)
        race = Race(lambda: evaluate(task.graph, model))
        starts: list[int] = []
        for done in range(min(rounds, EPISODES // ROUND)):
            while len(starts) < ROUND:  # epochs over the starts, each in an order of its own
                starts += rng.sample(task.graph.starts, len(task.graph.starts))
            chosen, starts = torch.tensor(starts[:ROUND])[:, None], starts[ROUND:]
            loop.iteration(Batch(chosen, torch.ones_like(chosen)))
            race.judged((done + 1) * ROUND)
    return race


LOOPS = {"ours": ours, "stand-in": stand_in}


def reached(races: list[Race], aim: float = MIN_MEDIAN) -> tuple[int, list[float]] | None:
    """(episodes, seconds of each run) at the first judgement where the median optimality is the aim; None: nowhere."""
    for at, episodes in enumerate(races[0].episodes):
        if statistics.median(race.optimality[at] for race in races) >= aim:
            return episodes, [race.seconds[at] for race in races]
    return None


def line(name: str, races: list[Race]) -> str:
    """A row of the table."""
    whole, ends = [race.seconds[-1] for race in races], [race.optimality[-1] for race in races]
    found = reached(races)
    first = f"{found[0]} | {cell(found[1])}" if found else "not reached | –"
    return f"| {name} | {first} | {cell(whole)} | {cell(ends)} |"


def verdict(races: dict[str, list[Race]]) -> str:
    """Our time in the other's; where it never gets there, all of its time is what ours is at most a share of."""
    mine, other = reached(races["ours"]), reached(races["stand-in"])
    if mine is None:
        return f"ours does not reach a median of {MIN_MEDIAN}"
    theirs = other[1] if other else [race.seconds[-1] for race in races["stand-in"]]
    share = statistics.median(mine[1]) / statistics.median(theirs)
    behind = "" if other else f"; the stand-in does not get to {MIN_MEDIAN}, so this is an upper bound"
    return f"ours takes {share:.2f} of the stand-in's time (aim: at most {MAX_SHARE}){behind}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.walks_race", description=__doc__.split("\n")[0])
    parser.add_argument("--graphs", type=int, default=3, help="how many graphs")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds for each graph")
    parser.add_argument("--first-graph", type=int, default=FIRST_GRAPH, help="seed of the first graph")
    parser.add_argument("--rounds", type=int, default=EPISODES // ROUND, help=f"{ROUND} episodes each; fewer to try")
    parser.add_argument("--json", type=Path, help="write all raw figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is too small for more
    transformers.logging.set_verbosity_error()
    races: dict[str, list[Race]] = {name: [] for name in LOOPS}
    for graph in range(options.first_graph, options.first_graph + options.graphs):
        task = draw_task(graph)
        for name in alternating(list(LOOPS), options.seeds):
            seed = len(races[name]) % options.seeds
            races[name].append(race := LOOPS[name](task, seed, options.rounds))
            course = " ".join(f"{each:.2f}" for each in race.optimality)
            print(
                f"graph {graph} seed {seed} {name:>8} {race.seconds[-1]:5.1f} s: {task.start:.2f} | {course}",
                flush=True,
            )
    print(f"\n| loop | episodes to a median of {MIN_MEDIAN} | s until then | s of all | optimality at the end |")
    print("|---|---:|---:|---:|---:|")
    for name, runs in races.items():
        print(line(name, runs))
    print("\n" + verdict(races))
    if options.json:
        raw = {
            name: [{key: getattr(race, key) for key in ("episodes", "seconds", "optimality")} for race in runs]
            for name, runs in races.items()
        }
        options.json.write_text(json.dumps(raw, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
