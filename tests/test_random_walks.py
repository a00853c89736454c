"""The random-walks task by hand, and what PPO gains on it."""

from __future__ import annotations

import random

import pytest

from benchmarks.random_walks import (
    EOS,
    GOAL,
    LETTERS,
    MAX_CONTROL_GAIN,
    MIN_STARTS,
    MIN_WORST,
    NODES,
    Graph,
    controls,
    decode,
    draw_graph,
    draw_task,
    run,
    shuffled,
)

# b -> a;  c -> b, d;  d -> c, a;  e -> c;  f and g only to each other, and all others to f.
# L*: a 1, b 2, d 2, c 3, e 4; the rest never arrives.
SMALL = Graph(((), (0,), (1, 3), (2, 0), (2,), (6,), (5,)) + ((5,),) * (NODES - 7))


pytestmark = pytest.mark.usefixtures("one_thread")


def test_shortest_walks_by_hand():
    assert SMALL.shortest == {0: 1, 1: 2, 3: 2, 2: 3, 4: 4}
    assert SMALL.starts == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "walk, optimality",
    [
        ("ba", 1.0),  # L = L* = 2
        ("ecba", 1.0),  # L = L* = 4
        ("ecda", 1.0),  # another of the shortest
        ("dcba", 6 / 8),  # L = 4 where 2 would do
        ("cdcba", 5 / 7),  # a circle is a valid detour
        ("cdcdcdcda", 1 / 7),  # nine nodes
        ("cdcdcdcdba", 0.0),  # no edge d -> b
        ("dcdcdcdcba", 0.0),  # ten nodes are the most, and worth nothing
        ("edcba", 0.0),  # no edge e -> d
        ("cb", 0.0),  # never arrives
        ("c", 0.0),
        ("bab", 0.0),  # the goal has no edges
    ],
)
def test_optimality_by_hand(walk: str, optimality: float):
    assert SMALL.optimality(walk) == pytest.approx(optimality)
    assert SMALL.reward([walk[0]], [walk[1:]]) == [pytest.approx(optimality)]


def test_random_walks_follow_edges_and_end_at_the_goal():
    rng = random.Random(0)
    graph = draw_graph(rng)
    assert len(graph.starts) >= MIN_STARTS and graph.edges[GOAL] == ()
    arrived = 0
    for _ in range(200):
        walk = graph.random_walk(rng)
        nodes = walk[:-1] if walk[-1] == EOS else walk
        assert all(after in graph.edges[before] for before, after in zip(nodes, nodes[1:], strict=False))
        assert nodes[-1] == GOAL if walk[-1] == EOS else len(nodes) == 10 and GOAL not in nodes
        arrived += walk[-1] == EOS
    assert 0 < arrived < 200


def test_a_graph_and_its_letters():
    assert [decode([node]) for node in range(NODES)] == list(LETTERS)
    assert draw_graph(random.Random(5)) == draw_graph(random.Random(5))


def test_shuffling_keeps_the_scores_and_loses_their_places():
    completions = ["a", "ba", "da", "cba", "cda", "", "a", "cb"]
    prompts = list("bcceeddd")
    scores = SMALL.reward(prompts, completions)
    permuted = shuffled(SMALL.reward, seed=0)(prompts, completions)
    assert sorted(permuted) == sorted(scores) and permuted != scores


@pytest.mark.slow
def test_ppo_finds_short_walks_and_nothing_where_there_is_nothing_to_learn():
    task = draw_task(seed=1)
    ends = [run(task, seed) for seed in range(2)]
    assert min(ends) >= MIN_WORST, ends
    gains = controls(task)
    assert gains.keys() == {"shuffled scores", "learning rate 0"}
    assert max(gains.values()) <= MAX_CONTROL_GAIN, gains
