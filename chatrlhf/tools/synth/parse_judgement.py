"""What a judge said: the number or the letter in a reply, where there is exactly one; nothing is ever guessed."""

from __future__ import annotations

import re

THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)  # what reasoning models say to themselves
STILL_THINKING = "it was cut while the model was still thinking; allow more --max_tokens"
MARKUP = r"[\s*_`\"'#()\[\]]*"
NUMBER = r"(?<![\w.,])[-+−]?[0-9]+(?:[.,][0-9]+)?(?!\w|[.,][0-9]|\s*%)"
BETWEEN = r"\s*(?:-|–|—|to|or|and)\s*"
RANGE = re.compile(rf"{NUMBER}{BETWEEN}[0-9]")
OUT_OF = re.compile(rf"({NUMBER}){MARKUP}(?:/|out of){MARKUP}({NUMBER})")
LABELLED = re.compile(
    rf"(?i:\b(?:score|rating|grade)\b){MARKUP}(?i:is|of|[=:])?{MARKUP}({NUMBER})"
    rf"|(?i:\b(?:answer|verdict|points)\b){MARKUP}[=:]{MARKUP}({NUMBER})"
)
ALONE = re.compile(rf"^{MARKUP}({NUMBER})\.?{MARKUP}$", re.MULTILINE)
LETTER = r"([AB])(?![\w'])"
LETTERS = (
    re.compile(
        rf"(?i:\b(?:better|verdict|winner|choice|answer)\b){MARKUP}(?i:(?:reply|one)\b)?{MARKUP}(?i:is\b|:)?"
        rf"{MARKUP}(?i:reply\b)?{MARKUP}{LETTER}"
    ),
    re.compile(rf"\b{LETTER} is (?:the )?better\b"),
    re.compile(rf"\A{MARKUP}(?i:reply )?{LETTER}{MARKUP}(?:[.:,;)]|\n|\Z)"),
    re.compile(rf"(?i:\b(?:reply|prefer|choose|pick)\b){MARKUP}(?i:reply\b)?{MARKUP}{LETTER}"),
)


class NoVerdict(ValueError):
    """The reply holds no verdict, or more than one."""


def read_score(reply: str, low: float, high: float) -> float:
    """The score in a judge's reply.

    It is, in this order: a number out of the highest ("4/5", "4 out of 5"), a number that is called the score or the
    rating, one that has a line for itself, the only number there is.

    Args:
        low, high: the scale, ends included.

    Raises:
        NoVerdict: there is no number, there are different ones, or it is not on the scale.
    """
    text = _said(reply)
    scale = rf"(?<![\w.,]){low:g}{BETWEEN}{high:g}(?!\w|[.,][0-9])"  # a judge that repeats what it was told
    text = re.sub(scale, "", text)
    if spread := RANGE.search(text):
        raise NoVerdict(f"not one number but a range, {spread[0]!r}...")
    out_of = OUT_OF.findall(text)
    if other := next((most for _, most in out_of if _number(most) != high), None):
        raise NoVerdict(f"a number out of {other}, where the scale goes to {high:g}")
    found = (
        [number for number, _ in out_of]
        or ["".join(groups) for groups in LABELLED.findall(text)]
        or ALONE.findall(text)
        or re.findall(NUMBER, text)
    )
    numbers = sorted({_number(each) for each in found})
    if not numbers:
        raise NoVerdict("no number in it")
    if len(numbers) > 1:
        raise NoVerdict(f"several numbers in it: {', '.join(f'{number:g}' for number in numbers)}")
    if not low <= numbers[0] <= high:
        raise NoVerdict(f"{numbers[0]:g} is not on the scale from {low:g} to {high:g}")
    return numbers[0]


def read_letter(reply: str) -> str:
    """Which of two replies a judge prefers, ``A`` or ``B``.

    Raises:
        NoVerdict: neither is named, or both are.
    """
    text = _said(reply)
    for pattern in LETTERS:
        if found := set(pattern.findall(text)):
            if len(found) > 1:
                raise NoVerdict("both letters in it")
            return found.pop()
    raise NoVerdict("neither A nor B in it")


def after_thinking(reply: str) -> str | None:
    """A reply without what was thought before it; None where it was cut before anything was said."""
    text = THINKING.sub("", reply)
    return None if text.lstrip().startswith("<think>") else text


def _said(reply: str) -> str:
    text = after_thinking(reply)
    if text is None:
        raise NoVerdict(STILL_THINKING)
    return text


def _number(text: str) -> float:
    return float(text.replace(",", ".").replace("−", "-"))
