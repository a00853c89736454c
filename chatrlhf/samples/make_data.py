"""Write the sample data of the visitors' desk: `python -m chatrlhf.samples.make_data --path artifacts/datasets`.

The facts and the rule are fixed in `desk.py`; a seed redraws who asks what in which words, where replies go
wrong, and the noise on the scores. The same seed writes the same bytes.

Replies are of mixed quality on purpose, because the actor is what reinforcement learning improves: each
criterion is met with a fixed probability, independently of the others, so each has room to rise.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path

from chatrlhf.errors import DataError, UserError
from chatrlhf.runtime.atomic_files import replace_file
from chatrlhf.runtime.publication import Publication
from chatrlhf.samples import visitor_desk

DEFAULT_SEED = 0
ACTOR_ROWS, REWARD_ROWS, RL_PROMPTS, VALIDATION_PROMPTS = 4800, 4000, 300, 100
SCORE_NOISE = 0.5  # standard deviation, in points

# For each criterion how replies turn out, with weights: the first outcome meets it, the others do not. What misses
# it is mostly missing and seldom wrong: a reward model of this size and on these rows sees whether a reply states
# some fact, and hardly whether it is the right one. That is the actor's knowledge, and the KL term protects it.
OUTCOMES = {
    "courtesy": {"own": 0.48, "none": 0.46, "other": 0.06},
    "topic": {"own": 0.48, "none": 0.46, "other": 0.06},
    "fact": {"own": 0.48, "none": 0.46, "other": 0.06},
    "advice": {"own": 0.48, "none": 0.46, "other": 0.06},
    "form": {"own": 0.48, "unended": 0.26, "rambling": 0.26},
}

QUESTIONS = {
    "where": ("Where is the {}?", "How do I find the {}?", "Which street is the {} on?", "What is the way to the {}?"),
    "when": (
        "When does the {} open?",
        "What time can I see the {}?",
        "At what hour is the {} open?",
        "How early can I see the {}?",
    ),
    "cost": (
        "What does the {} cost?",
        "How much is the {}?",
        "What do I pay at the {}?",
        "What is the price of the {}?",
    ),
}
BROUGHT = {
    "dog": "my dog",
    "child": "my child",
    "bike": "my bike",
    "camera": "my camera",
    "wheelchair": "my wheelchair",
    "suitcase": "my suitcase",
}
REQUESTS = (
    "{greeting}, I bring {thing}. {question}",
    "{greeting}, I came with {thing}. {question}",
    "{greeting}. {question} I bring {thing}.",
    "{greeting}. {question} I came with {thing}.",
)

# {place} is "the abbey" or "it"; {fact} is a phrase of the desk, or the vague word below.
ANSWERS = {
    "where": ("{place} is {fact}.", "You find {place} {fact}."),
    "when": ("{place} opens {fact}.", "You may enter {place} {fact}."),
    "cost": ("{place} costs {fact}.", "You pay {fact} for {place}."),
}
VAGUE = {"where": "nearby", "when": "early", "cost": "little"}
RAMBLING = (
    "Many people ask us about this every day.",
    "We all like to talk about our town.",
    "It has been so for a very long time.",
    "My aunt said the same thing only last week.",
    "We hope that the weather will stay fine.",
)

Row = dict[str, str | float]


def _prompts(rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """`count` prompts over all (place, question) pairs in turn, none of them in `taken`; adds them to it."""
    prompts: list[str] = []
    pairs: list[tuple[str, str]] = []
    while len(prompts) < count:
        if not pairs:
            pairs = [(place, kind) for place in visitor_desk.PLACES for kind in visitor_desk.KINDS]
            rng.shuffle(pairs)
        place, kind = pairs[-1]
        prompt = rng.choice(REQUESTS).format(
            greeting=rng.choice(visitor_desk.GREETINGS),
            thing=BROUGHT[rng.choice(list(BROUGHT))],
            question=rng.choice(QUESTIONS[kind]).format(place),
        )
        if prompt not in taken:
            taken.add(prompt)
            prompts.append(prompt)
            pairs.pop()
    return prompts


def _other(rng: random.Random, options: tuple[str, ...], own: str) -> str:
    return rng.choice([option for option in options if option.lower() != own.lower()])


def _completion(rng: random.Random, prompt: str) -> str:
    """A reply to `prompt` whose criteria are met or missed as `OUTCOMES` draws them."""
    drawn = {name: rng.choices(list(ways), list(ways.values()))[0] for name, ways in OUTCOMES.items()}
    request = visitor_desk.read_request(prompt)
    (place,), ((kind, _),), (thing,) = request.places, request.facts, request.brings
    fact = visitor_desk.FACTS[place][kind]

    greeting = {
        "own": request.greeting.capitalize() + "!",
        "none": "",
        "other": _other(rng, visitor_desk.GREETINGS, request.greeting) + "!",
    }[drawn["courtesy"]]
    own, other = f"the {place}", f"the {_other(rng, visitor_desk.PLACES, place)}"
    subject = {"own": own, "none": "it", "other": other}[drawn["topic"]]
    stated = {
        "own": visitor_desk.PHRASES[kind].format(fact),
        "none": VAGUE[kind],
        "other": visitor_desk.PHRASES[kind].format(_other(rng, visitor_desk.VALUES[kind], fact)),
    }[drawn["fact"]]
    advice = {
        "own": rng.choice(visitor_desk.ADVICE[thing]),
        "none": "",
        "other": rng.choice(visitor_desk.ADVICE[_other(rng, tuple(visitor_desk.ADVICE), thing)]),
    }[drawn["advice"]]

    answer = rng.choice(ANSWERS[kind]).format(place=subject, fact=stated)
    answer = answer[0].upper() + answer[1:]
    parts = [part for part in (greeting, answer, advice) if part]
    if drawn["form"] == "rambling":
        for sentence in rng.sample(RAMBLING, len(RAMBLING)):
            if len(" ".join(parts).split()) > visitor_desk.MAX_WORDS:
                break
            parts.append(sentence)
    text = " ".join(parts)
    return text[:-1] if drawn["form"] == "unended" else text


def _noisy(rng: random.Random, points: float) -> float:
    return round(min(max(rng.gauss(points, SCORE_NOISE), 0.0), visitor_desk.BEST_SCORE), 1)


def make_datasets(seed: int) -> dict[str, list[Row]]:
    """All rows by file name, a function of `seed` alone."""
    rng = random.Random(seed)
    taken: set[str] = set()
    # Held-out prompts are drawn first, each of another (place, question) pair; no later prompt may repeat one.
    validation = _prompts(rng, VALIDATION_PROMPTS, taken)
    training = _prompts(rng, RL_PROMPTS, taken)
    actor: list[Row] = [
        {"user_input": prompt, "completion": _completion(rng, prompt)} for prompt in _prompts(rng, ACTOR_ROWS, taken)
    ]
    reward: list[Row] = []
    for prompt in _prompts(rng, REWARD_ROWS, taken):
        completion = _completion(rng, prompt)
        points = _noisy(rng, visitor_desk.score(prompt, completion))
        reward.append({"user_input": prompt, "completion": completion, "score": points})
    return {
        "actor_training_data.json": actor,
        "reward_training_data.json": reward,
        "rlhf_training_data.json": [{"user_input": prompt} for prompt in training],
        "rlhf_validation_data.json": [{"user_input": prompt} for prompt in validation],
    }


def to_json(rows: list[Row]) -> str:
    """One row a line, so that a diff shows rows."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def write_datasets(path: Path, seed: int, *, force: bool = False) -> list[Path]:
    """Write the four files into `path`, together; one that is there is not overwritten without `force`.

    Raises:
        UserError: files would be overwritten, another process writes there, or the folder cannot be written.
    """
    files = {path / name: partial(replace_file, text=to_json(rows)) for name, rows in make_datasets(seed).items()}
    with Publication(path, "make_data", "--path") as publication:
        existing = [str(file) for file in publication.in_the_way(files)]
        if existing and not force:
            raise DataError(f"refused to overwrite {', '.join(existing)}: give --force, or another --path")
        publication.publish(files, force)
    return list(files)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m chatrlhf.samples.make_data", description="Write the visitors' desk sample data."
    )
    parser.add_argument("--path", type=Path, required=True, help="folder to write the four JSON files into")
    parser.add_argument(
        "--seed",
        type=int,
        default=DEFAULT_SEED,
        help="redraws requests, wording, faults and noise (default %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite files that are there")
    args = parser.parse_args(argv)
    try:
        files = write_datasets(args.path, args.seed, force=args.force)
    except UserError as error:
        parser.error(str(error))
    for file in files:
        print(file)


if __name__ == "__main__":
    main()
