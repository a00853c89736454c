"""The visitors' desk: the rule by hand, no phrase that wins everywhere, and data with the promised properties."""

from __future__ import annotations

import ast
import json
import random
import statistics
import sys
from itertools import combinations
from pathlib import Path

import pytest

from chatrlhf.samples import make_data, visitor_desk

ROOT = Path(__file__).parent.parent
PROMPT = "Bonjour. When does the north mill open? I bring my dog."
BEST = "Bonjour! The north mill opens at nine. Dogs may come in."
SEEDS = (make_data.DEFAULT_SEED, 101, 102)


@pytest.fixture(scope="module", params=SEEDS)
def data(request) -> dict[str, list[make_data.Row]]:
    return make_data.make_datasets(request.param)


def texts(rows: list[make_data.Row], key: str = "user_input") -> list[str]:
    return [row[key] for row in rows]


def lost(completion: str, prompt: str = PROMPT) -> set[str]:
    """The criteria that a completion misses."""
    return {name for name, points in visitor_desk.criteria(prompt, completion).items() if points < 1.0}


# The rule, by hand.


def test_a_perfect_reply():
    assert visitor_desk.criteria(PROMPT, BEST) == {
        "courtesy": 1.0,
        "topic": 1.0,
        "fact": 1.0,
        "advice": 1.0,
        "form": 1.0,
    }
    assert visitor_desk.score(PROMPT, BEST) == visitor_desk.BEST_SCORE == 5.0
    assert visitor_desk.best_completion(PROMPT) == BEST


@pytest.mark.parametrize(
    ("completion", "missed"),
    [
        ("The north mill opens at nine. Dogs may come in.", {"courtesy"}),
        ("Hola! The north mill opens at nine. Dogs may come in.", {"courtesy"}),
        ("The north mill opens at nine. Dogs may come in. Bonjour!", {"courtesy"}),
        ("Bonjour! It opens at nine. Dogs may come in.", {"topic"}),
        ("Bonjour! The mill opens at nine. Dogs may come in.", {"topic"}),
        ("Bonjour! The south mill opens at nine. Dogs may come in.", {"topic"}),
        ("Bonjour! The north mill or the south mill opens at nine. Dogs may come in.", {"topic"}),
        ("Bonjour! The north mill opens early. Dogs may come in.", {"fact"}),
        ("Bonjour! The north mill opens at ten. Dogs may come in.", {"fact"}),
        ("Bonjour! The north mill costs two coins. Dogs may come in.", {"fact"}),  # true, but not asked
        ("Bonjour! The north mill opens at nine or at ten. Dogs may come in.", {"fact"}),
        ("Bonjour! The north mill opens at nine and costs two coins. Dogs may come in.", {"fact"}),
        ("Bonjour! The north mill opens at nine.", {"advice"}),
        ("Bonjour! The north mill opens at nine. Bikes stay outside.", {"advice"}),
        ("Bonjour! The north mill opens at nine. Dogs and bikes stay outside.", {"advice"}),
        ("Bonjour! The north mill opens at nine. Dogs.", {"advice"}),
        ("Bonjour! The north mill opens at nine. Dogs may come in", {"form"}),
        ("bonjour! The north mill opens at nine. Dogs may come in.", {"form"}),
        ("Bonjour! The north mill opens opens at nine. Dogs may come in.", {"form"}),
        ("Bonjour! The north mill opens at nine. Dogs may come in. Dogs may come in.", {"form"}),
        ("Bonjour! The north mill opens at nine. Dogs may come in. We all like to talk about our town.", {"form"}),
        ("Dogs.", {"courtesy", "topic", "fact", "advice", "form"}),
        ("?", {"courtesy", "topic", "fact", "advice", "form"}),
        (" \n", {"courtesy", "topic", "fact", "advice", "form"}),
        ("", {"courtesy", "topic", "fact", "advice", "form"}),
    ],
)
def test_each_criterion_alone(completion: str, missed: set[str]):
    assert lost(completion) == missed
    assert visitor_desk.score(PROMPT, completion) == 5.0 - len(missed)


def test_other_words_for_the_same_reply():
    assert lost("Bonjour, you may enter the north mill at nine. Water for dogs is here!") == set()


def test_sixteen_words_are_the_most():
    reply = "Bonjour! The north mill opens at nine each day. Dogs may come in with you too."
    assert len(reply.split()) == 16 and lost(reply) == set()
    assert lost(reply.replace("you too", "both of you")) == {"form"}


@pytest.mark.parametrize(
    ("prompt", "best"),
    [
        (
            "Hola, I came with my child. Where is the upper tower?",
            "Hola! The upper tower is on King Street. Children may play here.",
        ),
        ("Ciao. How much is the east library?", "Ciao! The east library costs twelve coins."),
        ("What time can I see the lower market?", "Hello! The lower market opens at seven."),
    ],
)
def test_what_a_prompt_leaves_out_a_good_reply_leaves_out(prompt: str, best: str):
    assert visitor_desk.best_completion(prompt) == best
    assert lost(best, prompt) == set()
    assert ("advice" in lost(best + " Dogs may come in.", prompt)) is True


def test_prompts_of_another_kind_are_judged_but_have_no_best_reply():
    assert visitor_desk.criteria("Tell me a joke", "Hello! The north mill opens at nine.")["topic"] == 0.0
    with pytest.raises(ValueError, match="Tell me a joke"):
        visitor_desk.best_completion("Tell me a joke")


def test_silence_earns_nothing_whatever_was_asked():
    assert visitor_desk.score("Tell me a joke", "") == 0.0  # though it names no place and no fact, as the prompt does


def test_the_judge_takes_batches():
    assert visitor_desk.judge([PROMPT, PROMPT], [BEST, ""]) == [
        visitor_desk.criteria(PROMPT, BEST),
        visitor_desk.criteria(PROMPT, ""),
    ]
    assert tuple(visitor_desk.criteria(PROMPT, "")) == visitor_desk.CRITERIA
    with pytest.raises(ValueError):
        visitor_desk.judge([PROMPT], [])


def test_the_rule_needs_the_standard_library_only():
    tree = ast.parse(Path(visitor_desk.__file__).read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names <= sys.stdlib_module_names


# No phrase wins everywhere.


def test_every_held_out_prompt_has_a_best_reply_of_its_own(data):
    prompts = texts(data["rlhf_validation_data.json"])
    best = [visitor_desk.best_completion(prompt) for prompt in prompts]
    assert [visitor_desk.score(prompt, reply) for prompt, reply in zip(prompts, best, strict=True)] == [5.0] * len(
        prompts
    )
    assert (
        len(
            {
                (*visitor_desk.read_request(prompt).places, *visitor_desk.read_request(prompt).facts)
                for prompt in prompts
            }
        )
        == 100
    )
    assert len(set(best)) == 100


def test_no_constant_reply_earns_half_of_the_best_score(data):
    prompts = texts(data["rlhf_validation_data.json"])
    several = ", ".join(f"the {place}" for place in visitor_desk.PLACES[:3])
    constants = [
        *map(visitor_desk.best_completion, prompts),
        *random.Random(0).sample(texts(data["actor_training_data.json"], "completion"), 100),
        "Hello! It is open. Dogs may come in.",
        f"Hello! We have {several}. Dogs may come in.",
        "Hello! All is on Fox Street at nine for two coins. Dogs may come in.",
        "Hello! The north mill is near. Dogs, bikes, children and cameras may come in.",
    ]
    means = []
    for reply in constants:
        points = visitor_desk.judge(prompts, [reply] * len(prompts))
        means.append({name: statistics.fmean(row[name] for row in points) for name in visitor_desk.CRITERIA})
    assert max(sum(mean.values()) for mean in means) <= 0.40 * visitor_desk.BEST_SCORE
    # Nor could a reply put together from the best part of each.
    assert sum(max(mean[name] for mean in means) for name in visitor_desk.CRITERIA) <= 0.45 * visitor_desk.BEST_SCORE


# The data.


def test_the_files_are_what_the_generator_writes(tmp_path):
    for file in make_data.write_datasets(tmp_path, make_data.DEFAULT_SEED):
        shipped = ROOT / "artifacts" / "datasets" / file.name
        assert shipped.read_bytes() == file.read_bytes(), f"{shipped}: write it anew with chatrlhf.samples.make_data"
        assert shipped.stat().st_size < 1_200_000
        rows = json.loads(shipped.read_text(encoding="utf-8"))
        assert shipped.read_text(encoding="utf-8").count("\n") == len(rows) + 2


def test_rows_and_keys(data):
    keys = {name: {tuple(row) for row in rows} for name, rows in data.items()}
    assert keys == {
        "actor_training_data.json": {("user_input", "completion")},
        "reward_training_data.json": {("user_input", "completion", "score")},
        "rlhf_training_data.json": {("user_input",)},
        "rlhf_validation_data.json": {("user_input",)},
    }
    assert len(data["actor_training_data.json"]) >= 1000
    assert len(data["reward_training_data.json"]) >= 600
    assert len(data["rlhf_training_data.json"]) == 300
    assert len(data["rlhf_validation_data.json"]) == 100


def test_no_prompt_is_in_two_places(data):
    prompts = [prompt for rows in data.values() for prompt in texts(rows)]
    assert len(set(prompts)) == len(prompts)


def test_every_held_out_question_is_answered_in_training_in_other_words(data):
    def asked(prompt: str) -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
        request = visitor_desk.read_request(prompt)
        return request.places, request.facts

    answered = {asked(row["user_input"]) for row in data["actor_training_data.json"]}
    assert {asked(prompt) for prompt in texts(data["rlhf_validation_data.json"])} <= answered


def test_the_rule_reads_every_prompt(data):
    for prompt in (prompt for rows in data.values() for prompt in texts(rows)):
        request = visitor_desk.read_request(prompt)
        assert request.greeting and len(request.places) == len(request.facts) == len(request.brings) == 1


@pytest.mark.parametrize("name", ["actor_training_data.json", "reward_training_data.json"])
def test_replies_are_of_mixed_quality_and_criteria_independent(data, name: str):
    points = visitor_desk.judge(texts(data[name]), texts(data[name], "completion"))
    met = {criterion: [row[criterion] for row in points] for criterion in visitor_desk.CRITERIA}
    for criterion in visitor_desk.CRITERIA:
        assert statistics.fmean(met[criterion]) == pytest.approx(make_data.OUTCOMES[criterion]["own"], abs=0.03)
    for first, second in combinations(visitor_desk.CRITERIA, 2):
        assert abs(statistics.correlation(met[first], met[second])) < 0.06
    assert {sum(row.values()) for row in points} == {0.0, 1.0, 2.0, 3.0, 4.0, 5.0}


def test_scores_are_the_true_ones_with_noise(data):
    rows = data["reward_training_data.json"]
    scores = texts(rows, "score")
    true = [visitor_desk.score(row["user_input"], row["completion"]) for row in rows]
    assert all(0.0 <= score <= 5.0 and score == round(score, 1) for score in scores)
    noise = [score - points for score, points in zip(scores, true, strict=True) if 2.0 <= points <= 3.0]  # unclipped
    assert statistics.fmean(noise) == pytest.approx(0.0, abs=0.05)
    assert statistics.stdev(noise) == pytest.approx(0.5, abs=0.03)


def test_a_seed_redraws_all_but_the_facts():
    first, second = make_data.make_datasets(1), make_data.make_datasets(2)
    assert first == make_data.make_datasets(1)
    for name in first:
        assert not set(map(make_data.to_json, [[row] for row in first[name]])) >= set(
            map(make_data.to_json, [[row] for row in second[name]])
        )


def test_files_are_not_overwritten_unasked(tmp_path, capsys):
    other = tmp_path / "rlhf_validation_data.json"
    other.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        make_data.main(["--path", str(tmp_path)])
    assert stop.value.code == 2
    assert str(other) in (error := capsys.readouterr().err) and "--force" in error
    assert other.read_text() == "mine" and list(tmp_path.iterdir()) == [other]  # nothing written before it refused
    make_data.main(["--path", str(tmp_path), "--seed", "3", "--force"])
    assert other.read_text() == make_data.to_json(make_data.make_datasets(3)[other.name])
    assert len(capsys.readouterr().out.splitlines()) == 4
