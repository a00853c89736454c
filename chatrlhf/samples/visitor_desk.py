"""The visitors' desk: a language task small enough for a laptop, with a rule that knows how good any reply is.

A visitor greets, says what they bring along, and asks one thing about one place in town. The clerk replies:

    Visitor: Bonjour. When does the north mill open? I bring my dog.
    Clerk:   Bonjour! The north mill opens at nine. Dogs may come in.

Five independent criteria, each worth one point; the request decides what meets the first four:

    courtesy  opens with the visitor's own greeting, not with none or another   "Bonjour! ..."
    topic     names the place asked about and no other place                    "... The north mill ..."
    fact      states the fact asked for and no other fact                       "... at nine ..."
    advice    has a sentence for what the visitor brings and for nothing else   "... Dogs may come in."
    form      capital first, a full stop or ! last, 3 to 16 words, no word twice in a row, no sentence twice

What a prompt leaves out a good reply leaves out too (who brings nothing needs no advice), and silence earns nothing.

Landmarks, in points of 5, for the sample data (`generate.py`) and its 100 held-out prompts:

    best reply to each prompt (`best_completion`, a different one for each)                    5.0
    best constant reply: good form, and now and then a greeting, an item or a fact by chance   1.6
    actor fine-tuned on the sample rows, sampled at temperature 1                              2.3

Standard library only; pure functions of any prompt and any completion.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

CRITERIA = ("courtesy", "topic", "fact", "advice", "form")
BEST_SCORE = float(len(CRITERIA))
MIN_WORDS, MAX_WORDS = 3, 16

GREETINGS = ("Hello", "Bonjour", "Hola", "Ciao")

# A place is a sight in a quarter ("the north mill"). The sights of a quarter share its street; a sight opens at
# the same hour and costs the same coins wherever it stands.
QUARTERS = {"north": "Fox", "south": "Rose", "east": "River", "west": "Elm", "upper": "King", "lower": "Bell"}
SIGHTS = {
    "mill": ("nine", "two"),
    "museum": ("ten", "five"),
    "tower": ("noon", "three"),
    "market": ("seven", "four"),
    "garden": ("eight", "six"),
    "library": ("eleven", "twelve"),
}
KINDS = ("where", "when", "cost")
FACTS: dict[str, dict[str, str]] = {
    f"{quarter} {sight}": {"where": street, "when": hour, "cost": coins}
    for quarter, street in QUARTERS.items()
    for sight, (hour, coins) in SIGHTS.items()
}
PLACES = tuple(FACTS)
VALUES = {kind: tuple(sorted({facts[kind] for facts in FACTS.values()})) for kind in KINDS}

# How a fact of each kind is put into words, and the words that ask for it.
PHRASES = {"where": "on {} Street", "when": "at {}", "cost": "{} coins"}
_ASKED = {
    "where": re.compile(r"\b(where|way|street|find)\b", re.I),
    "when": re.compile(r"\b(when|time|early|hour|open)\b", re.I),
    "cost": re.compile(r"\b(cost|pay|price|much|ticket)\b", re.I),
}

# What visitors bring: the word that names it, and the sentences the desk has for it.
ADVICE = {
    "dog": ("Dogs may come in.", "Dogs get water here."),
    "child": ("Children may play here.", "Children get a map."),
    "bike": ("Bikes stay outside.", "Bikes have a rack."),
    "camera": ("Cameras are allowed.", "Cameras need no flash."),
    "wheelchair": ("Wheelchairs use the ramp.", "Wheelchairs take the lift."),
    "suitcase": ("Suitcases stay with us.", "Suitcases fit the lockers."),
}


def _any_of(words: tuple[str, ...], ending: str = "") -> str:
    return rf"\b({'|'.join(words)}){ending}\b"


_PLACE = re.compile(_any_of(PLACES), re.I)
_BRINGS = re.compile(_any_of(tuple(ADVICE), "(?:s|ren)?"), re.I)
_GREETING = re.compile(rf"\W*{_any_of(GREETINGS)}", re.I)
_FACT = {kind: re.compile(phrase.format(_any_of(VALUES[kind])), re.I) for kind, phrase in PHRASES.items()}
_WORD = re.compile(r"[A-Za-z']+")


def _found(pattern: re.Pattern[str], text: str) -> frozenset[str]:
    return frozenset(match.lower() for match in pattern.findall(text))


def _greeting(text: str) -> str | None:
    match = _GREETING.match(text)
    return match.group(1).lower() if match else None


def _facts_stated(text: str) -> frozenset[tuple[str, str]]:
    return frozenset((kind, value) for kind, pattern in _FACT.items() for value in _found(pattern, text))


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence.strip()]


@dataclass(frozen=True)
class Request:
    """What a prompt asks for; an empty set or None where it says nothing of the kind."""

    greeting: str | None
    places: frozenset[str]
    facts: frozenset[tuple[str, str]]  # (kind, value), the value in lower case
    brings: frozenset[str]


@lru_cache(maxsize=4096)
def read_request(prompt: str) -> Request:
    """The request in a prompt's words; a question is of the first kind, in the order of `KINDS`, whose words it has."""
    places = _found(_PLACE, prompt)
    kind = next((kind for kind in KINDS if _ASKED[kind].search(prompt)), None)
    facts = frozenset((kind, FACTS[place][kind].lower()) for place in places) if kind else frozenset()
    return Request(_greeting(prompt), places, facts, _found(_BRINGS, prompt))


def _well_formed(text: str) -> bool:
    words = [word.lower() for word in _WORD.findall(text)]
    sentences = [sentence.lower() for sentence in _sentences(text)]
    return (
        text[0].isupper()
        and text.endswith((".", "!"))
        and MIN_WORDS <= len(words) <= MAX_WORDS
        and all(word != following for word, following in pairwise(words))
        and len(set(sentences)) == len(sentences)
    )


def criteria(prompt: str, completion: str) -> dict[str, float]:
    """Points per criterion, each 0 or 1, in the order of `CRITERIA`."""
    text = completion.strip()
    if not text:
        return dict.fromkeys(CRITERIA, 0.0)
    request = read_request(prompt)
    greeting = _greeting(text)
    # A bare word is no advice: only sentences of three words or more count towards it.
    advice = " ".join(s for s in _sentences(text) if len(_WORD.findall(s)) >= MIN_WORDS)
    met = (
        greeting is not None and request.greeting in (None, greeting),
        _found(_PLACE, text) == request.places,
        _facts_stated(text) == request.facts,
        _found(_BRINGS, text) == _found(_BRINGS, advice) == request.brings,
        _well_formed(text),
    )
    return {name: float(value) for name, value in zip(CRITERIA, met, strict=True)}


def score(prompt: str, completion: str) -> float:
    """The sum of the criteria, in points from 0 to `BEST_SCORE`."""
    return sum(criteria(prompt, completion).values())


def judge(prompts: list[str], completions: list[str]) -> list[dict[str, float]]:
    """`criteria` of each pair, for `eval_fn: chatrlhf.samples.visitor_desk:judge` in a configuration."""
    return [criteria(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def best_completion(prompt: str) -> str:
    """A reply that earns `BEST_SCORE`; raises `ValueError` for a prompt that asks for no fact of exactly one place."""
    request = read_request(prompt)
    if len(request.places) != 1 or not request.facts:
        raise ValueError(
            f"no best reply to {prompt!r}: expected a question about one place; the desk knows {', '.join(PLACES)}"
        )
    (place,), ((kind, _),) = request.places, request.facts
    verb = {"where": "is", "when": "opens", "cost": "costs"}[kind]
    answer = f"The {place} {verb} {PHRASES[kind].format(FACTS[place][kind])}."
    greeting = (request.greeting or GREETINGS[0]).capitalize()
    return " ".join([f"{greeting}!", answer, *(ADVICE[thing][0] for thing in sorted(request.brings))])
