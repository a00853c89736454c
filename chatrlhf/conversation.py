"""One record for every dataset: a prompt, what answered it, and where it came from.

prompt      system text, narrative, turns, and the name of who answers
answers     any of: a completion, scored completions, ranked completions, a chosen and a rejected one
text        or, in place of both, plain text for language modeling
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["user", "assistant"]
SPEAKERS = {"user": "Human", "assistant": "Assistant"}  # of turns without a name, where a prompt is shown as one text


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Role
    text: str
    name: str | None = None  # of the speaker, where the dataset has names


@dataclass(frozen=True)
class Prompt:
    """Everything that stands before the reply that a model is trained on, or asked for."""

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    narrative: str | None = None  # the scene in which a dialogue takes place
    reply_name: str | None = None  # of who answers
    place: str | None = field(default=None, compare=False, repr=False)  # file and row it was read from, for messages

    @staticmethod
    def of(prompt: Prompt | str) -> Prompt:
        """A text as the prompt of one user turn; a prompt as it is."""
        return Prompt((Turn("user", prompt),)) if isinstance(prompt, str) else prompt

    @property
    def is_text(self) -> bool:
        """Whether it is one user turn and nothing else, as all of ChatLLaMA's prompts are."""
        return len(self.turns) == 1 and self == Prompt.of(self.turns[0].text)

    @property
    def text(self) -> str:
        """The prompt as one text, for people, judges and reward functions; what a model sees is made by a template.

        A single user turn is itself; otherwise each part is a paragraph and each turn opens with its speaker.
        """
        if self.is_text:
            return self.turns[0].text
        parts = [part for part in (self.system, self.narrative) if part]
        return "\n\n".join([*parts, *(f"{turn.name or SPEAKERS[turn.role]}: {turn.text}" for turn in self.turns)])


@dataclass(frozen=True)
class Scored:
    """A completion with a score, in the unit of its dataset; None where it has not been scored yet. 0 is a score."""

    completion: str
    score: float | None


@dataclass(frozen=True)
class Ranked:
    """A completion with its place among the others, 0 the best; equals share a place."""

    completion: str
    rank: int


@dataclass(frozen=True)
class Pair:
    """Two completions, the first preferred."""

    chosen: str
    rejected: str


@dataclass(frozen=True)
class Provenance:
    """Where a record came from."""

    dataset: str | None = None
    row: str | None = None  # the dataset's own id of it, or its place in a file
    licence: str | None = None
    generated_by: str | None = None  # the model that wrote it, where one did
    group: str | None = None  # of records that belong together, a tree's or a post's: no split comes between them
    judged_by: str | None = None  # the model that gave its scores or its order, where one did


@dataclass(frozen=True)
class Conversation:
    """A record. See the top of this file."""

    prompt: Prompt = Prompt()
    completion: str | None = None
    scored: tuple[Scored, ...] = ()
    ranked: tuple[Ranked, ...] = ()
    pair: Pair | None = None
    text: str | None = None
    provenance: Provenance = field(default_factory=Provenance)
